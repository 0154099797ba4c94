"""What a model costs on a number of ranks, by the formulas of ``embeddings.costs`` alone: thousands in a second."""

import dataclasses
from dataclasses import dataclass

import torch

from mlet_dist.embeddings.costs import (
    DenseCost,
    Device,
    Memory,
    Optimizer,
    Step,
    StepTime,
    TableCost,
    Way,
    rows_of_rank,
    step_time,
    total_memory,
    total_step,
)
from mlet_dist.embeddings.exchange import ExchangeChoice, TableTraffic, choose_exchange
from mlet_dist.models.dlrm import build_dlrm, dense_cost
from mlet_dist.models.spec import ModelSpec


@dataclass(frozen=True)
class Case:
    """What is planned.

    Attributes:
        spec: tables and layers.
        pooling_factors: ids a bag by table.
        optimizer: of the run.
        exchange: as in the config.
        batch_size: global.
        world_size: R.
        local_world_size: ranks of a node.
        device: hardware of a rank.
    """

    spec: ModelSpec
    pooling_factors: dict[str, float]
    optimizer: Optimizer
    exchange: ExchangeChoice
    batch_size: int
    world_size: int
    local_world_size: int
    device: Device

    @property
    def local_batch_size(self) -> int:
        return max(1, self.batch_size // self.world_size)

    def with_model(self, **settings: int | None) -> "Case":
        """The same with other settings of the model."""
        model = dataclasses.replace(self.spec.model, **settings)  # type: ignore[arg-type]
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, model=model))

    def dense(self) -> DenseCost:
        """Of the layers beside the tables."""
        model = build_dlrm(self.spec, torch.device("meta"))
        return dense_cost(model, self.local_batch_size, self.optimizer, self.world_size)


def table_costs_of(case: Case) -> list[tuple[TableCost, int]]:
    """Each table's cost with the rows of its fullest rank, row_wise unless it has too few rows."""
    model, found = case.spec.model, []
    for feature in case.spec.sparse:
        traffic = TableTraffic(
            feature.num_embeddings,
            model.embedding_dim,
            case.pooling_factors[feature.name],
            1,
            case.local_batch_size,
        )
        width, on_cpu = model.hidden_dim or model.embedding_dim, case.device.kind == "cpu"
        rows = rows_of_rank(feature.num_embeddings, width, case.world_size, on_cpu=on_cpu)
        way: Way = "replicated"
        if rows is not None:
            chosen = choose_exchange(traffic, case.world_size)[0]
            way = chosen if case.exchange == "auto" else case.exchange
        cost = TableCost(
            name=feature.name,
            row_width=width,
            projected=model.hidden_dim is not None,
            traffic=traffic,
            optimizer=case.optimizer,
            way=way,
            world_size=case.world_size,
            on_cpu=on_cpu,
        )
        found.append((cost, feature.num_embeddings if rows is None else rows))
    return found


def fullest_rank(case: Case, dense: DenseCost) -> Memory:
    """Bytes of the rank that holds a full block of every table."""
    tables = total_memory(cost.memory(rows) for cost, rows in table_costs_of(case))
    return tables + dense.memory(tables.buffers)


def step_of(case: Case, dense: DenseCost) -> tuple[Step, StepTime]:
    """What a rank does in a step, and how long it takes at the hardware's peak rates."""
    step = total_step([*(cost.step() for cost, _ in table_costs_of(case)), dense.step()])
    return step, step_time(step, case.device, case.world_size, case.local_world_size)


def configurations(case: Case) -> list[tuple[str, Case]]:
    """The same tables in several ways: a single layer and MLET, each as TorchRec's row_wise and as here."""
    d, k = case.spec.model.embedding_dim, case.spec.model.hidden_dim
    plain = dataclasses.replace(case, exchange="after")
    found = [
        (f"single layer d = {d}, TorchRec's row_wise", plain.with_model(hidden_dim=None)),
        (f"single layer d = {d}, {case.exchange}", case.with_model(hidden_dim=None)),
    ]
    if k is not None:
        found += [
            (f"single layer d = {k}, TorchRec's row_wise", plain.with_model(hidden_dim=None, embedding_dim=k)),
            (f"MLET k = {k}, after the exchange", plain),
            (f"MLET k = {k}, {case.exchange}", case),
        ]
    return found
