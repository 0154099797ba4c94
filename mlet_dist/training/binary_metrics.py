"""AUC and LogLoss of one label, counted in bounded memory and the same for any number of ranks."""

import math
from collections.abc import Mapping

import torch
from torch import distributed as dist
from torch.nn import functional

_LOGIT_LIMIT = 30.0
_ROWS_TOGETHER = 1 << 14


class BinaryMetrics:
    """AUC and LogLoss over any number of rows, the same for any number of ranks.

    Labels are counted by logit in equal bins over [-30, 30]; logits outside count in the outermost bins. AUC follows
    from the counts: pairs within one bin are ties and count half. With the default 2^20 bins, logits that differ by
    less than 6e-5 may tie. LogLoss is summed in float64.

    Rows may have weights. The counts are then sums of weights in float64, so that a row of weight 2 counts as two rows;
    LogLoss and the positive rate are weighted means.

    Args:
        device: the device of the counts.
        bins: the number of bins.
        weighted: whether rows have weights.
    """

    def __init__(self, device: torch.device, bins: int = 1 << 20, *, weighted: bool = False) -> None:
        self._bins, self._weighted = bins, weighted
        self._counts = torch.zeros(2, bins, dtype=torch.float64 if weighted else torch.int64, device=device)
        self._rows = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self._pending_rows = 0

    def update(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count rows; ``logits`` ``(b,)`` float, ``labels`` ``(b,)`` 0 or 1, ``weights`` ``(b,)`` if there are any.

        The tensors must not be changed afterwards: the rows of small batches are counted together, which saves a dozen
        kernels a step.
        """
        self._pending.append((logits.detach(), labels, weights))
        self._pending_rows += len(logits)
        if self._pending_rows >= _ROWS_TOGETHER:
            self._count_pending()

    @torch.no_grad()
    def _count_pending(self) -> None:
        """Count the rows of all updates so far, with the same result whenever it is called."""
        if not self._pending:
            return
        logits, labels, weights = zip(*self._pending, strict=True)
        self._rows += self._pending_rows
        self._pending, self._pending_rows = [], 0
        wide, of_rows = torch.cat(logits).double(), torch.cat(labels)
        binned = wide.nan_to_num()  # a NaN is visible in the loss
        scaled = (binned.clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT) + _LOGIT_LIMIT) * (self._bins / (2 * _LOGIT_LIMIT))
        bin_of_row = scaled.long().clamp_(max=self._bins - 1)
        flat = bin_of_row + of_rows.long() * self._bins
        weighted = None if weights[0] is None else torch.cat(weights).double()
        counted = torch.ones_like(flat, dtype=self._counts.dtype) if weighted is None else weighted
        self._counts.view(-1).scatter_add_(0, flat, counted)
        losses = functional.binary_cross_entropy_with_logits(wide, of_rows.double(), weighted, reduction="none")
        for of_update in losses.split([len(each) for each in logits]):  # one sum for all would round differently
            self._loss += of_update.sum()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return ``counts`` ``(2, bins)`` of all ranks, and ``loss`` ``(R,)`` float64 by rank. A collective call.

        Weighted metrics also have ``rows``, the number of rows of all ranks.
        """
        self._count_pending()
        counts, rows = self._counts.clone(), self._rows.clone()
        losses = [self._loss.clone()]
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(rows)
            losses = [torch.empty_like(self._loss) for _ in range(dist.get_world_size())]
            dist.all_gather(losses, self._loss)
        state = {"counts": counts, "loss": torch.stack(losses)}
        return state | {"rows": rows} if self._weighted else state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a state on any number of ranks; on the same number, sums are bitwise identical."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._pending, self._pending_rows = [], 0
        self._counts.copy_(state["counts"] if rank == 0 else torch.zeros_like(self._counts))
        rows = state["rows"] if self._weighted else state["counts"].sum()
        self._rows.copy_(rows if rank == 0 else torch.zeros_like(self._rows))
        self._loss.copy_(state["loss"][rank::world_size].sum())

    def compute(self, process_group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Return ``auc``, ``logloss``, ``rows`` and ``positive_rate`` over all ranks; NaN where undefined.

        Weighted metrics also have ``weight``, the sum of all weights. A collective call of all ranks of the group.
        """
        self._count_pending()
        counts, loss, rows = self._counts.clone(), self._loss.clone(), self._rows.clone()
        if dist.is_initialized():
            dist.all_reduce(counts, group=process_group)
            dist.all_reduce(loss, group=process_group)
            dist.all_reduce(rows, group=process_group)
        negatives, positives = counts.double().cpu()
        num_negatives, num_positives = negatives.sum(), positives.sum()
        total = float(num_negatives + num_positives)
        below = negatives.cumsum(0) - negatives
        wins = (positives * (below + negatives / 2)).sum()
        pairs = float(num_negatives * num_positives)
        found = {
            "auc": float(wins) / pairs if pairs else math.nan,
            "logloss": float(loss) / total if total else math.nan,
            "rows": int(rows),
            "positive_rate": float(num_positives) / total if total else math.nan,
        }
        return found | {"weight": total} if self._weighted else found
