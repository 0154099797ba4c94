"""Batches are checked together: what one rank finds, all ranks raise at the same point."""

import torch
from torch import distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.embeddings.input_check import (
    SmallestTables,
    _first_outside,
    _Kind,
    _Mistake,
    _of_common_types,
    _outside,
    _select,
    _structural_mistake,
    _weights_text,
    _with_values,
)
from mlet_dist.embeddings.sharded.collectives import Agreement


class Verdict:
    """What the ranks found in one batch. Others' findings are read without waiting for what else a device does."""

    def __init__(self, checker: "BatchChecker", code: torch.Tensor, mistake: _Mistake | None, batch: KeyedJaggedTensor):
        self._checker, self._mistake, self._batch = checker, mistake, batch
        self._agreement = Agreement(code, checker.process_group)

    def raise_mistake(self) -> None:
        """Wait for the other ranks' findings.

        Raises:
            ValueError: the batch of some rank is bad: this rank's own mistake, with the value, or else another's.
        """
        (code,) = self._agreement.read()
        if code:
            raise ValueError(self._checker.describe(code, self._mistake, self._batch))


class BatchChecker:
    """Checks the batches of a sharded module, together with the other ranks.

    Args:
        tables: the smallest table of each feature, in the order in which batches are to have their features.
        is_weighted: whether batches carry per-sample weights.
        process_group: the ranks that share the module.
        device: where batches live.
        refusing: a table that cannot serve a batch size that varies by feature, and why, or None.
    """

    def __init__(
        self,
        tables: SmallestTables,
        is_weighted: bool,
        process_group: dist.ProcessGroup,
        device: torch.device,
        refusing: tuple[str, str] | None,
    ) -> None:
        self.process_group = process_group
        self.world_size, self._rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        self._tables, self._is_weighted, self._refusing = tables, is_weighted, refusing
        self._names = list(tables)
        self._rows = torch.tensor([rows for _, rows in tables.values()], device=device)
        # TorchRec lays out its output for one of the two by the first batch, and keeps to it.
        self._varying: bool | None = False if refusing else None

    def check(self, features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Verdict]:
        """The batch as this rank may send it, in the order of ``tables``, and the verdict to come. A collective call.

        Raises:
            ValueError: in the first batch, the batch size varies by feature on some ranks only; on every rank.
        """
        if self._varying is None:
            self._varying = self._agree_on_varying(features.variable_stride_per_key())
        mistake = _structural_mistake(features, self._tables, self._is_weighted) or self._wrong_variation(features)
        code = torch.zeros(1, dtype=torch.int64, device=self._rows.device)
        if mistake is not None:
            code.fill_(self._code(int(mistake.kind), mistake.feature))
            batch = self._harmless(features)
            return batch, Verdict(self, code, mistake, batch)
        features = _select(_of_common_types(features), self._names)
        outside = _outside(features, self._rows)
        if not outside.numel() or (not outside.is_cuda and not bool(outside.any())):
            return features, Verdict(self, code, None, features)
        counts = torch.tensor(features.length_per_key(), device=outside.device)
        feature = torch.searchsorted(counts.cumsum(0), outside.int().argmax(), right=True)
        code = torch.where(outside.any(), self._code(_Kind.OUTSIDE, feature), code)
        return _with_values(features, features.values().masked_fill(outside, 0)), Verdict(self, code, None, features)

    def describe(self, code: int, own: _Mistake | None, batch: KeyedJaggedTensor) -> str:
        """The message of a code: of this rank's own mistake where it made one."""
        mistake = own or _first_outside(batch, self._tables)
        if mistake is not None:
            return mistake.text
        code, rank = divmod(code - 1, self.world_size)
        kind, feature = divmod(code, len(self._names))
        return f"rank {rank}: {self._describe(_Kind(kind), feature)}"

    def _code(self, kind: int, feature: "int | torch.Tensor") -> "int | torch.Tensor":
        return (kind * len(self._names) + feature) * self.world_size + self._rank + 1

    def _describe(self, kind: _Kind, feature: int) -> str:
        name = self._names[feature]
        table, rows = self._tables[name]
        if kind is _Kind.OUTSIDE:
            return f"table {table!r}: feature {name!r}: an id is outside [0, {rows})"
        if kind is _Kind.MISSING:
            return f"table {table!r}: feature {name!r} is missing from the batch"
        if kind is _Kind.WEIGHTS:
            return _weights_text(table, self._is_weighted)
        if kind is _Kind.MALFORMED:
            return f"table {table!r}: the batch's ids, lengths and weights do not fit one another"
        if self._refusing:
            refusing, reason = self._refusing
            return f"table {refusing!r}: the batch size varies by feature, which {reason}"
        varies = "does not vary" if self._varying else "varies"
        return f"table {table!r}: the batch size {varies} by feature, unlike in the first batch"

    def _agree_on_varying(self, varying: bool) -> bool:
        found = torch.tensor([varying, not varying], dtype=torch.int64, device=self._rows.device)
        if self.world_size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.process_group)
        if bool(found.all()):
            table = self._tables[self._names[0]][0]
            raise ValueError(f"table {table!r}: the batch size varies by feature on some ranks and not on others")
        return varying

    def _wrong_variation(self, features: KeyedJaggedTensor) -> _Mistake | None:
        if features.variable_stride_per_key() != self._varying:
            return _Mistake(_Kind.VARYING, 0, self._describe(_Kind.VARYING, 0))
        return None

    def _harmless(self, like: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Empty bags, as many as the batch has."""
        device, stride, count = self._rows.device, like.stride(), len(self._names)
        rows = torch.arange(stride, device=device)
        return KeyedJaggedTensor(
            keys=self._names,
            values=torch.empty(0, dtype=torch.int64, device=device),
            weights=torch.empty(0, device=device) if self._is_weighted else None,
            lengths=torch.zeros(count * stride, dtype=torch.int64, device=device),
            stride=None if self._varying else stride,
            stride_per_key_per_rank=torch.full((count, 1), stride) if self._varying else None,
            inverse_indices=(self._names, rows.repeat(count, 1)) if self._varying else None,
        )
