"""The logits that a step of training takes its loss from, where the model is trained at several widths."""

from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.data.hashing import hash_counters
from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.models.spec import ModelSpec


@dataclass(frozen=True)
class NestedLoss:
    """How a model is trained at several widths.

    Attributes:
        widths: of the model.
        sampled: whether each row is seen at one width, instead of at all of them.
        seed: of the run, from which widths are drawn.
    """

    widths: NestedWidths
    sampled: bool
    seed: int

    @classmethod
    def of(cls, spec: ModelSpec, model: nn.Module) -> "NestedLoss | None":
        """Return how a model is trained at several widths; None for one that is not."""
        widths = NestedWidths.of(spec, model)
        return None if widths is None else cls(widths, spec.model.nested_loss == "sampled", spec.seed)

    def logits(self, model: nn.Module, dense: torch.Tensor, sparse: KeyedJaggedTensor, step: int) -> list[torch.Tensor]:
        """Return logits ``(b, …)`` whose mean losses have the loss of the step as their mean.

        Args:
            step: of the run, from 0.
        """
        if not self.sampled:
            return self.widths.at_all(model, dense, sparse)
        rows = len(dense)
        drawn = self.drawn(step, dist.get_rank() * rows, rows)
        return [self.widths.at_width(model, dense, sparse, drawn.to(dense.device))]

    def drawn(self, step: int, first: int, rows: int) -> torch.Tensor:
        """Return the widths ``(rows,)`` int64 of rows of a step's global batch, from number ``first`` on.

        They depend on seed, step and number alone, so that they are the same for any number of ranks and after a
        resume. Every width has the same probability.
        """
        apart = -1 - ((self.seed << 64) + step)  # from the numbers by which rows are shuffled, which are not negative
        bits = hash_counters(apart, first, rows)
        index = torch.from_numpy((bits % len(self.widths.widths)).astype("int64"))
        return torch.tensor(self.widths.widths)[index]
