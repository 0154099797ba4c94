"""Moves rows of adaptive tables between widths after each step, and reports how many moved."""

from collections import defaultdict

import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel

from mlet_dist.embeddings.sharded.module import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.sharded.slot_map import SlotMap
from mlet_dist.training.reporting import Recorder
from mlet_dist.training.state import Training


class RowMoveSchedule:
    """Gives rows their new widths after each step in which their pass is due; does nothing without adaptive tables.

    Every ``log_every`` steps, and before each validation, a record of the split ``compression`` has ``moves``, how
    often rows have changed their width so far; ``kept_<table>``, the share of a table's rows that have columns; and
    ``width_<w>_kept``, the share of those rows of all tables that began with w columns because of their counts.

    Args:
        model: the sharded model.
        recorder: metrics.jsonl and TensorBoard.
        log_every: steps between two records.
    """

    def __init__(self, model: DistributedModelParallel, recorder: Recorder, log_every: int) -> None:
        self._collections = [
            module for module in model.modules() if isinstance(module, ShardedMultiLayerEmbeddingBagCollection)
        ]
        self._adaptive = bool(_slot_maps(model))
        self._recorder, self._log_every = recorder, log_every

    def __call__(self, training: Training) -> None:
        """Move rows; called after each step."""
        if not self._adaptive:
            return
        for collection in self._collections:
            collection.move_rows(training.optimizer)
        if training.step % self._log_every == 0 or training.is_done or training.needs_validation:
            moves = torch.stack([slots.moves.sum() for slots in _slot_maps(training.model)]).sum()
            dist.all_reduce(moves)
            by_table, by_width = kept_shares(training.model)
            kept = {f"kept_{table}": share for table, share in by_table.items()}
            kept |= {f"width_{width}_kept": share for width, share in by_width.items()}
            self._recorder.record("compression", training.step, {"moves": int(moves), **kept})


def kept_shares(model: DistributedModelParallel) -> tuple[dict[str, float], dict[int, float]]:
    """Return the share of the rows of adaptive tables that have columns. A collective call.

    Returns:
        The shares by table; and of the rows of all tables by the width that they began with, the largest first.
    """
    rows: dict[str | int, int] = defaultdict(int)
    kept: dict[str | int, int] = defaultdict(int)
    for slots in _slot_maps(model):
        of_ranges = slots.kept_rows()
        dist.all_reduce(of_ranges)
        for (table, size, width), number in zip(slots.layout.row_ranges(), of_ranges.tolist(), strict=True):
            for key in (table, width):
                rows[key] += size
                kept[key] += number
    shares = {key: kept[key] / rows[key] for key in rows}
    widths = sorted((key for key in shares if isinstance(key, int)), reverse=True)
    return {key: shares[key] for key in shares if isinstance(key, str)}, {key: shares[key] for key in widths}


def _slot_maps(model: DistributedModelParallel) -> list[SlotMap]:
    collections = (each for each in model.modules() if isinstance(each, ShardedMultiLayerEmbeddingBagCollection))
    return [each.adaptive_tables.slots for each in collections if each.adaptive_tables is not None]
