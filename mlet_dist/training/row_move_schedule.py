"""Moves rows of adaptive tables between widths after each step, and reports how many moved."""

import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel

from mlet_dist.embeddings.sharded.module import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.sharded.slot_map import SlotMap
from mlet_dist.training.reporting import Recorder
from mlet_dist.training.state import Training


class RowMoveSchedule:
    """Gives rows their new widths after each step in which their pass is due; does nothing without adaptive tables.

    Every ``log_every`` steps a record of the split ``compression`` has ``moves``, how often rows have changed their
    width so far, and ``kept_<table>``, the share of a table's rows that have columns.

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
        if training.step % self._log_every == 0 or training.is_done:
            moves = torch.stack([slots.moves.sum() for slots in _slot_maps(training.model)]).sum()
            dist.all_reduce(moves)
            kept = {f"kept_{table}": share for table, share in kept_shares(training.model).items()}
            self._recorder.record("compression", training.step, {"moves": int(moves), **kept})


def kept_shares(model: DistributedModelParallel) -> dict[str, float]:
    """Return the share of rows with columns of each adaptive table. A collective call."""
    found: dict[str, float] = {}
    for slots in _slot_maps(model):
        kept = slots.kept_rows()
        dist.all_reduce(kept)
        sizes = zip(slots.layout.tables, slots.layout.num_embeddings, kept.tolist(), strict=True)
        found |= {table: number / rows for table, rows, number in sizes}
    return found


def _slot_maps(model: DistributedModelParallel) -> list[SlotMap]:
    collections = (each for each in model.modules() if isinstance(each, ShardedMultiLayerEmbeddingBagCollection))
    return [each.adaptive_tables.slots for each in collections if each.adaptive_tables is not None]
