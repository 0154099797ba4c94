"""The input check of a sharded module: an error in one rank's batch is raised on all ranks at the same point.

A rank that raised alone would leave the others waiting in a collective. Instead, a rank with an invalid batch
substitutes an empty batch (or, for an id outside its table, id 0) and takes part in the same collectives. All ranks
raise once they know of the error, before any output is exchanged, so the process group stays usable.

Each rank encodes what it found as one int64, 0 for a valid batch. Under the exchange unique_rows, every rank sends its
code to all others beside the numbers of requested rows; elsewhere an all-reduce returns the largest code.
"""

import torch
from torch import distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, _pin_and_move

from mlet_dist.embeddings.input_check import (
    ErrorKind,
    InputError,
    SmallestTables,
    find_outside_id,
    find_structural_error,
    outside_ids,
    select_features,
    weights_message,
    with_common_dtypes,
    with_values,
)
from mlet_dist.embeddings.sharded.collectives import AsyncAllReduceMax


class BatchChecker:
    """Checks the batches of a sharded module on all its ranks.

    Args:
        tables: the smallest table of each feature, in the order in which batches must have their features.
        is_weighted: whether batches carry per-sample weights.
        process_group: the ranks that share the module.
        device: device of the batches.
        refusing: a table that does not support a batch size that varies by feature, and the reason, or None.
        codes_exchanged: whether an exchange of the module sends the ranks' codes to each other, and calls
            ``CheckResult.agree``.

    Attributes:
        latest: the result for the latest batch.
    """

    latest: "CheckResult"

    def __init__(
        self,
        tables: SmallestTables,
        is_weighted: bool,
        process_group: dist.ProcessGroup,
        device: torch.device,
        refusing: tuple[str, str] | None,
        *,
        codes_exchanged: bool,
    ) -> None:
        self.codes_exchanged = codes_exchanged
        self.process_group = process_group
        self.world_size, self._rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        self._tables, self._is_weighted, self._refusing = tables, is_weighted, refusing
        self._names = list(tables)
        self._rows = torch.tensor([rows for _, rows in tables.values()], device=device)
        # TorchRec chooses one of the two output layouts by the first batch and keeps it.
        self._varying: bool | None = False if refusing else None

    def check(self, features: KeyedJaggedTensor) -> "tuple[KeyedJaggedTensor, CheckResult]":
        """Check this rank's batch, without waiting for a device. A collective call.

        Returns:
            The batch to send, with its features in the order of ``tables`` and without invalid ids, and the check
            result, which the caller reads later.

        Raises:
            ValueError: in the first batch, the batch size varies by feature on some ranks only; raised on every rank.
        """
        if self._varying is None:
            self._varying = self._agree_on_varying(features.variable_stride_per_key())
        batch, self.latest = self._check(features)
        return batch, self.latest

    def _check(self, features: KeyedJaggedTensor) -> "tuple[KeyedJaggedTensor, CheckResult]":
        error = find_structural_error(features, self._tables, self._is_weighted) or self._find_variation_error(features)
        code = torch.zeros(1, dtype=torch.int64, device=self._rows.device)
        if error is not None:
            code.fill_(self._code(int(error.kind), error.feature))
            batch = self._empty_batch(features)
            return batch, CheckResult(self, code, error, batch)
        features = select_features(with_common_dtypes(features), self._names)
        outside = outside_ids(features, self._rows)
        if not outside.numel() or (not outside.is_cuda and _has_none_outside(outside)):
            return features, CheckResult(self, code, None, features)
        counts = _pin_and_move(torch.tensor(features.length_per_key()), outside.device)
        feature = torch.searchsorted(counts.cumsum(0), outside.int().argmax(), right=True)
        code = torch.where(outside.any(), self._code(ErrorKind.OUTSIDE, feature), code)
        return with_values(features, features.values().masked_fill(outside, 0)), CheckResult(self, code, None, features)

    def describe(self, code: int, own: InputError | None, batch: KeyedJaggedTensor) -> str:
        """Return the message of a nonzero code; if this rank's own batch has an error, its message."""
        error = own or find_outside_id(batch, self._tables)
        if error is not None:
            return error.text
        code, rank = divmod(code - 1, self.world_size)
        kind, feature = divmod(code, len(self._names))
        return f"rank {rank}: {self._describe(ErrorKind(kind), feature)}"

    def _code(self, kind: int, feature: "int | torch.Tensor") -> "int | torch.Tensor":
        return (kind * len(self._names) + feature) * self.world_size + self._rank + 1

    def _describe(self, kind: ErrorKind, feature: int) -> str:
        name = self._names[feature]
        table, rows = self._tables[name]
        if kind is ErrorKind.OUTSIDE:
            return f"table {table!r}: feature {name!r}: an id is outside [0, {rows})"
        if kind is ErrorKind.MISSING:
            return f"table {table!r}: feature {name!r} is missing from the batch"
        if kind is ErrorKind.WEIGHTS:
            return weights_message(table, self._is_weighted)
        if kind is ErrorKind.MALFORMED:
            return f"table {table!r}: the batch's ids, lengths and weights are inconsistent"
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

    def _find_variation_error(self, features: KeyedJaggedTensor) -> InputError | None:
        if features.variable_stride_per_key() != self._varying:
            return InputError(ErrorKind.VARYING, 0, self._describe(ErrorKind.VARYING, 0))
        return None

    def _empty_batch(self, like: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Return a batch of as many bags as ``like``, all empty."""
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


def _has_none_outside(outside: torch.Tensor) -> bool:
    return not bool(outside.any())


class CheckResult:
    """The result of checking one batch on all ranks; it is read without waiting for other work of a device.

    Attributes:
        code: what this rank found, ``(1,)`` int64.
    """

    def __init__(self, checker: BatchChecker, code: torch.Tensor, error: InputError | None, batch: KeyedJaggedTensor):
        self.code = code
        self._checker, self._error, self._batch = checker, error, batch
        self._agreed: int | None = None
        self._codes = None if checker.codes_exchanged else AsyncAllReduceMax(code, checker.process_group)

    def agree(self, code: int) -> None:
        """Set the largest code of all ranks."""
        self._agreed = code

    def raise_input_error(self) -> None:
        """Raise the error that some rank found; if the codes are not exchanged with ids, wait for the other ranks.

        Raises:
            ValueError: some rank's batch is invalid. The error is this rank's own, with the value found, or else that
                of another rank.
        """
        if self._codes is not None:
            (self._agreed,) = self._codes.read()
        if self._agreed is None:
            raise RuntimeError("the ids of the batch were not exchanged before they are looked up")
        if self._agreed:
            raise ValueError(self._checker.describe(self._agreed, self._error, self._batch))
