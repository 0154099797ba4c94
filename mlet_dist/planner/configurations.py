"""One run to plan: its plan by TorchRec's planner, its least memory by formulas, and what it is compared with."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner import Topology

from mlet_dist.config.config_file import Config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.embeddings.planning.cost_model import Device, Memory, total_memory
from mlet_dist.embeddings.planning.dense_cost import DenseCost
from mlet_dist.embeddings.planning.plan_cost import Ranks, Tables, load_factor, table_cost
from mlet_dist.embeddings.planning.search_space import most_even_constraints, table_constraints
from mlet_dist.models.build import build_training_model, multi_layer_tables, row_tables
from mlet_dist.models.network_cost import dense_cost, sequence_length
from mlet_dist.models.row_widths import Counts, Sizes, budget_bytes
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.compressed_tables import with_row_ranges
from mlet_dist.training.fused_optimizers import fuse_row_optimizer
from mlet_dist.training.model_plan import DoesNotFit, ModelPlan
from mlet_dist.training.sharding import Sharding


@dataclass(frozen=True)
class Case:
    """A run to plan.

    Attributes:
        config: of its sections, only model, optimizer, sharding and data matter.
        spec: the tables and layers of the model.
        pooling_factors: the mean ids of a bag, by table.
        ranks: the number of ranks, and of ranks on each node.
        device: the hardware of each rank.
        counts: for compressed tables the lookups of each row by table, from which settings decide on widths.
    """

    config: Config
    spec: ModelSpec
    pooling_factors: dict[str, float]
    ranks: Ranks
    device: Device
    counts: Mapping[str, Counts] = field(default_factory=dict)

    @property
    def local_batch_size(self) -> int:
        """The rows of a training batch on each rank."""
        return max(1, self.config.data.batch_size // self.ranks.world_size)

    def with_settings(self, section: str, **settings: Any) -> "Case":
        """Return this case with other settings in one section of the config.

        Raises:
            UserError: with these settings the budget of compressed tables is too small.
        """
        changed = dataclasses.replace(getattr(self.config, section), **settings)
        return self._with_section(section, changed)

    def with_model(self, model: ModelConfig) -> "Case":
        """Return this case with another section `model`.

        Raises:
            UserError: as for ``with_settings``.
        """
        return self._with_section("model", model)

    def _with_section(self, section: str, changed: Any) -> "Case":
        config = dataclasses.replace(self.config, **{section: changed})
        spec = self.spec.with_model(config)
        if spec.row_ranges and section in ("model", "compression", "optimizer"):
            spec, _ = with_row_ranges(spec, config, self.counts)
        return dataclasses.replace(self, config=config, spec=spec)

    def with_ranks(self, world_size: int) -> "Case":
        """Return this case on another number of ranks."""
        return dataclasses.replace(self, ranks=dataclasses.replace(self.ranks, world_size=world_size))

    def model(self) -> nn.Module:
        """Build the model on the meta device."""
        names = [table.name for table in self.spec.tables]
        meta = torch.device("meta")
        model = build_training_model(self.spec, meta, self.config.sharding.rows_dtypes(names), dense_device=meta)
        fuse_row_optimizer(model, self.config.optimizer)
        return model

    def sharding(self, model: nn.Module) -> Sharding:
        """Return the constraints of the config on the plan."""
        return Sharding.of(
            self.config.sharding,
            model,
            self.local_batch_size,
            self.pooling_factors,
            len(self.spec.dense),
            self.config.model.copies_of_rows,
        )

    def dense(self, model: nn.Module) -> DenseCost:
        """Return the cost of the dense layers."""
        ranks = self.ranks
        return dense_cost(
            model,
            len(self.spec.dense),
            self.config.model.copies_of_rows * self.local_batch_size,
            self.config.optimizer.name,
            ranks.world_size,
            ranks.local_world_size,
            sequence_length(row_tables(model), self.pooling_factors),
            on_cpu=ranks.on_cpu,
        )

    def topology(self) -> Topology:
        """Return the hardware as TorchRec's Topology."""
        device, on_cpu = self.device, self.ranks.on_cpu
        return Topology(
            world_size=self.ranks.world_size,
            local_world_size=self.ranks.local_world_size,
            compute_device=device.kind,
            hbm_cap=int(device.memory),
            ddr_cap=int(device.memory if on_cpu else device.host_memory),
            hbm_mem_bw=device.memory_bandwidth / 1e3,
            ddr_mem_bw=device.memory_bandwidth / 1e3,
            intra_host_bw=device.node_bandwidth / 1e3,
            inter_host_bw=device.network_bandwidth / 1e3,
        )

    def plan(self) -> ModelPlan:
        """Return the plan of TorchRec's planner.

        Raises:
            UserError: the tables do not fit (``DoesNotFit``), or a constraint cannot be met.
        """
        model = self.model()
        return self.sharding(model).plan(model, self.topology(), self.device)

    def plan_or_evenest(self) -> ModelPlan:
        """Return ``plan()``, or if nothing fits, the plan that spreads rows most evenly."""
        try:
            return self.plan()
        except DoesNotFit as error:
            return error.planned

    def with_torchrec_exchange(self) -> "Case":
        """Return this case with W2 after the exchange, so with vectors of k columns on the network, for every table."""
        tables = {name: dataclasses.replace(own, exchange=None) for name, own in self.config.sharding.tables.items()}
        return self.with_settings("sharding", exchange="after", tables=tables)

    def uncompressed(self) -> "Case":
        """Return this case with all rows of one width."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, row_ranges={}))


def budget_share(case: Case) -> float:
    """Return the budget of compressed tables as a share of the bytes of single-layer tables."""
    budget = case.config.compression.budget
    if not isinstance(budget, str):
        return budget
    sizes = Sizes(case.spec.model.embedding_dim, case.config.optimizer.name, own_dims=case.spec.embedding_dims)
    single = sizes.single({table.name: table.num_embeddings for table in case.spec.tables})
    return budget_bytes(case.config.compression, single) / single


def even_memory(case: Case) -> Memory:
    """Return a lower bound of every plan's fullest rank: its memory with rows spread as evenly as the config allows."""
    model = case.model()
    sharding = case.sharding(model)
    weights = {
        table.name: tables.row_weight(table.name)
        for tables in multi_layer_tables(model).values()
        for table in tables.row_tables()
    }
    configs = row_tables(model)
    limited = table_constraints(configs, case.ranks, sharding.sharder, sharding.constraints, sharding.replicated_bytes)
    parts = []
    for table in configs:
        own = most_even_constraints(limited[table.name])
        (kind,), (kernel,) = own.sharding_types or [""], own.compute_kernels or [""]
        cost = table_cost(
            table, weights[table.name], sharding.sharder, case.ranks, kind, kernel, load_factor(own.cache_params)
        )
        blocks = 1 if cost.exchange is None else cost.num_owners
        held = cost.owner_memory(-(-table.num_embeddings // blocks))
        parts.append(cost.requester_memory() + held.times(cost.num_owners / case.ranks.world_size))
    found = total_memory(parts)
    return found + case.dense(model).memory(found.gradients)


def configurations(case: Case, planned: ModelPlan) -> list[tuple[str, Tables, DenseCost]]:
    """Return what the plan is compared with: single layers and MLET, with TorchRec's exchange and as configured.

    Configurations with TorchRec's exchange have a plan of their own: with wide vectors, other sharding types send the
    fewest bytes.
    """
    if case.spec.row_ranges:
        share = f"compressed to {budget_share(case):.0%} of the single layer's bytes"
        case, compressed = case.uncompressed(), planned
        found = configurations(case, case.plan_or_evenest())
        return [*found, (share, compressed.tables, compressed.dense)]
    exchange, dims = case.config.sharding.exchange, case.spec.embedding_dims
    composed = case.with_torchrec_exchange()
    alone = composed.with_model(composed.config.model.single_layer()).plan_or_evenest()
    d = _describe(dims.values())
    found = [
        (f"single layer d = {d}, TorchRec's exchange", alone.tables, alone.dense),
        (f"single layer d = {d}, {exchange}", _single_layers(planned.tables, dims), planned.dense),
    ]
    hidden_dims = [table.hidden_dim for table in case.spec.tables if table.hidden_dim is not None]
    if hidden_dims:
        naive, k, widest = composed.plan_or_evenest(), _describe(hidden_dims), max(hidden_dims)
        wide_model = dataclasses.replace(case.config.model, embedding_dim=widest, hidden_dim=None, tables={})
        wide = dict.fromkeys(dims, widest)
        found += [
            (
                f"single layer d = {widest}, TorchRec's exchange",
                _single_layers(naive.tables, wide),
                case.dense(case.with_model(wide_model).model()),
            ),
            (f"MLET k = {k}, after the exchange", naive.tables, naive.dense),
            (f"MLET k = {k}, {exchange}", planned.tables, planned.dense),
        ]
    return found


def _describe(columns: Collection[int]) -> str:
    """Return a number of columns, or the least and the largest of several."""
    least, most = min(columns), max(columns)
    return f"{least}" if least == most else f"{least} to {most}"


def _single_layers(tables: Tables, embedding_dims: Mapping[str, int]) -> Tables:
    """Return single-layer tables of these widths with the same placement."""
    found = {}
    for name, (cost, rows) in tables.items():
        width = embedding_dims[name]
        traffic = dataclasses.replace(cost.traffic, embedding_dim=width)
        changed = dataclasses.replace(cost, traffic=traffic, row_width=width, projected=False)
        found[name] = (changed, rows)
    return found
