"""What the sharded module does for adaptive tables: their slots, their state, their lookups, and moving their rows."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import ShardingEnv
from torchrec.distributed.utils import none_throws

from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables, projection_weights
from mlet_dist.embeddings.sharded.row_index import SlotIndex
from mlet_dist.embeddings.sharded.slot_map import PoolTensors, SlotMap
from mlet_dist.embeddings.sharded.unique_rows import UniqueRowsInputDist
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig

_SLOTS = "row_slots"
"""The prefix of the slots and utilities of adaptive rows in the state dict."""


def build_slot_map(module: MultiLayerTables, env: ShardingEnv, device: torch.device | None) -> SlotMap | None:
    """Return the slots of this rank's rows of adaptive tables, if the collection has any."""
    ranged = [table for table in module.table_configs() if table.row_ranges is not None]
    if module.adaptive is None or not ranged:
        return None
    return SlotMap(
        SlotLayout.of(ranged, module.adaptive.chunk_width),
        module.adaptive,
        env.rank,
        env.world_size,
        device or torch.device("cpu"),
    )


def locate_rows(input_dists: Sequence[nn.Module], contexts: Sequence[Any], dist_input: KJTList) -> KJTList:
    """Return the lookups' input with the slots of adaptive rows, which may have moved since the ids were exchanged.

    Args:
        input_dists: of the module's shardings.
        contexts: theirs, for the batch.
        dist_input: what they returned.
    """
    features = list(dist_input)
    for index, input_dist in enumerate(input_dists):
        if isinstance(input_dist, UniqueRowsInputDist) and isinstance(input_dist.index, SlotIndex):
            features[index] = input_dist.index.locate(none_throws(contexts[index].routing))
    return KJTList(features)


class AdaptiveTables:
    """The adaptive tables of a sharded module.

    Args:
        slots: of this rank's rows.
        pools: the tables that store them.
        module: the sharded module, with ``embedding_bags``, ``projections`` and ``fused_optimizer``.
    """

    def __init__(self, slots: SlotMap, pools: Sequence[MultiLayerEmbeddingBagConfig], module: Any) -> None:
        self.slots = slots
        self._tables = {table.row_width: table for table in pools}
        self._module = module

    def add_state(self, state: dict[str, Any], prefix: str, process_group: dist.ProcessGroup) -> None:
        """Add slots and utilities to a state dict."""
        state |= {f"{prefix}{_SLOTS}.{name}": tensor for name, tensor in self.slots.state(process_group).items()}

    def take_state(self, state: dict[str, Any], prefix: str) -> None:
        """Load slots and utilities from a state dict, and remove them from it.

        Raises:
            ValueError: a shape differs, or the state has sharded rows of the pools without their slots.
        """
        start = f"{prefix}{_SLOTS}."
        found = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
        if found:
            self.slots.load(found)
            return
        pools = (state.get(f"{prefix}embedding_bags.{table.name}.weight") for table in self._tables.values())
        if any(isinstance(pool, ShardedTensor) for pool in pools):
            raise ValueError(f"the state has rows of adaptive tables, but not {start}slots, which tell theirs")

    def move_rows(self, optimizer: torch.optim.Optimizer | None) -> int:
        """Count a step, and move rows whose pass is due; return how many of this rank's rows moved.

        Args:
            optimizer: steps the rows that have no fused kernel.

        Raises:
            ValueError: there are such rows, and it does not step them; or an optimizer has a state of another kind than
                those of SGD, Adagrad, RowWiseAdagrad and Adam.
        """
        self.slots.step += 1
        due = self.slots.due()
        if not due:
            return 0
        weights = projection_weights(self._module.projections)
        projections = {key: weights[name] for key, name in self._names_of_w2.items() if name in weights}
        return self.slots.move_rows(due, self._pools(optimizer), projections)

    @cached_property
    def _names_of_w2(self) -> dict[tuple[int, int], str]:
        """The name of W2 of each pool and part."""
        return {
            (index, part): segment.name
            for index, pool in enumerate(self.slots.layout.pools)
            for part, segment in zip(self.slots.segments(index), self._tables[pool.width].segments, strict=True)
        }

    def _pools(self, optimizer: torch.optim.Optimizer | None) -> list[PoolTensors]:
        """Return this rank's rows and optimizer state of each pool, not copied."""
        pools = []
        for pool in self.slots.layout.pools:
            name = self._tables[pool.width].name
            rows, states = self._module.embedding_bags[name].weight, self._fused_states.get(name)
            if states is None:
                states = None if optimizer is None else optimizer.state.get(rows)
            if states is None:
                raise ValueError(
                    f"pool {name!r}: its rows have no fused kernel, as with Adam on a CPU; give move_rows the "
                    "optimizer that steps them, so that their state moves with them"
                )
            pools.append(_pool_tensors(name, rows, states))
        return pools

    @cached_property
    def _fused_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state of each pool that has a fused kernel, by name: views of fbgemm's memory."""
        optimizer = self._module.fused_optimizer
        states = optimizer.state_dict()["state"]
        found = {}
        for table in self._tables.values():
            key = f"embedding_bags.{table.name}.weight"
            if key in optimizer.params:
                own = states.get(key, {})  # SGD has none
                found[table.name] = {
                    name.removeprefix(f"{table.name}."): state.local_shards()[0].tensor
                    for name, state in own.items()
                    if isinstance(state, ShardedTensor)  # not the number of steps
                }
        return found


def _pool_tensors(pool: str, rows: torch.Tensor, states: Mapping[str, torch.Tensor]) -> PoolTensors:
    """Return a pool's rows with the states of their optimizer, by fbgemm's names or torch's."""
    squares, means = [], []
    for name, state in states.items():
        if name == "exp_avg_sq" or (name == "momentum1" and "exp_avg_sq" not in states):
            squares.append(state)
        elif name in ("exp_avg", "momentum1"):
            means.append(state)
        elif name != "step":
            raise ValueError(
                f"pool {pool!r}: rows with the optimizer state {name!r} cannot move; use SGD, Adagrad, RowWiseAdagrad "
                "or Adam"
            )
    return PoolTensors(rows, tuple(squares), tuple(means))
