"""The second layer of an MLET table: W2, and how many of them are applied at once."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from mlet_dist.embeddings.initializers import RowInitializer


class Projection(nn.Module):
    """W2 of one table: ``weight`` ``(k, d)`` float32, initialised N(0, std^2).

    Args:
        table: the table's name, which with ``seed`` fixes the initial values.
        hidden_dim: k.
        embedding_dim: d.
        init_std: standard deviation of the initial values; the MLET paper uses 0.25, 1/sqrt(k) has unit gain.
        seed: the run's seed.
        device: where the weight lives; ``meta`` allocates nothing.
    """

    def __init__(
        self,
        table: str,
        hidden_dim: int,
        embedding_dim: int,
        init_std: float,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._initializer = RowInitializer(f"projections.{table}", hidden_dim, "normal", init_std, seed)
        self.weight = nn.Parameter(torch.empty(hidden_dim, embedding_dim, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values again (nothing on the meta device)."""
        if self.weight.device.type != "meta":
            self._initializer(self.weight)


def project(pooled: KeyedTensor, weights: Mapping[str, torch.Tensor]) -> KeyedTensor:
    """Apply each key's W2 to its pooled vectors: pool(W1[ids]) · W2.

    Neighbouring keys of equal k and d share one batched product.

    Args:
        pooled: values ``(B, sum of k)``; keys without a projection have their d already.
        weights: key -> W2 ``(k, d)``; a key that is missing passes through unchanged (a single-layer table).

    Returns:
        KeyedTensor of the same keys, values ``(B, sum of d)``.
    """
    if not weights:
        return pooled
    keys, widths, values = pooled.keys(), pooled.length_per_key(), pooled.values()
    offsets = pooled.offset_per_key()
    outputs: list[torch.Tensor] = []
    output_widths: list[int] = []
    positions = range(len(keys))
    for shape, group in groupby(positions, key=lambda i: weights[keys[i]].shape if keys[i] in weights else None):
        run = list(group)
        block = values[:, offsets[run[0]] : offsets[run[-1] + 1]]
        if shape is None:
            outputs.append(block)
            output_widths += [widths[i] for i in run]
        else:
            outputs.append(_project_run(block, [weights[keys[i]] for i in run]))
            output_widths += [shape[1]] * len(run)
    return KeyedTensor(
        keys=keys,
        length_per_key=output_widths,
        values=outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1),
        key_dim=1,
    )


def _project_run(block: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``(B, G·k)`` and G weights ``(k, d)`` -> ``(B, G·d)``."""
    stacked = torch.stack(list(weights))
    groups, hidden_dim, embedding_dim = stacked.shape
    by_group = block.reshape(-1, groups, hidden_dim).transpose(0, 1)
    return torch.bmm(by_group, stacked).transpose(0, 1).reshape(-1, groups * embedding_dim)
