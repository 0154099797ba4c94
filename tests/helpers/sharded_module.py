"""Helpers for tests of the sharded module: building one on each rank, its optimizers, its batches, its full weights."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import QuantizedCommCodecs
from torchrec.distributed.utils import none_throws
from torchrec.optim import Adam
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mlet_dist.embeddings import (
    LazyAdam,
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingBagConfig,
    MultiLayerEmbeddingCollection,
    MultiLayerEmbeddingCollectionSharder,
    ShardedMultiLayerEmbeddingBagCollection,
)
from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables
from mlet_dist.embeddings.row_ranges import segments_of
from mlet_dist.embeddings.sharded.exchange_choice import ExchangeChoice
from tests.helpers.dense_reference import Bags, Table, toy_loss
from tests.helpers.ranks import full_tensor, rank_device

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
_Tables = TypeVar("_Tables", bound=MultiLayerTables)
_SGD, _ADAGRAD = torch.optim.SGD, torch.optim.Adagrad
_FUSED = dict(zip(OPTIMIZERS, (_SGD, _ADAGRAD, RowWiseAdagrad, Adam), strict=True))
_ROWS = dict(zip(OPTIMIZERS, (_SGD, _ADAGRAD, RowWiseAdagrad, LazyAdam), strict=True))
_DENSE = dict(zip(OPTIMIZERS, (_SGD, _ADAGRAD, _ADAGRAD, torch.optim.Adam), strict=True))


def make_positive(module: _Tables) -> _Tables:
    """Make a module's weights positive, so that no gradient of ``toy_loss`` cancels, and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.abs_().mul_(0.3).add_(0.05)
    return module


def dense_tables(module: MultiLayerTables) -> list[Table]:
    """Return the tables of an unsharded module for the dense reference."""
    state = module.state_dict()
    orders = {table.name: none_throws(table.row_order) for table in module.row_tables()}
    stored = {segment.name: (table.name, segment) for table in module.row_tables() for segment in segments_of([table])}

    def part(name: str, rows: int) -> Table:
        if name not in stored:
            return Table(name, torch.zeros(rows, 0), None, "sum", [])
        where, segment = stored[name]
        by_id = orders[where].from_stored(state[f"{module.rows_name}.{where}.weight"])
        of_segment = by_id[segment.offset : segment.offset + segment.rows]
        return Table(name, of_segment, state.get(f"projections.{name}.weight"), "sum", [])

    found = []
    for table in module.table_configs():
        if table.row_ranges is None:
            whole = part(table.name, table.num_embeddings)
        else:
            ranges = [part(f"{table.name}:{index}", rows) for index, (rows, _, _) in enumerate(table.row_ranges)]
            whole = Table(table.name, torch.empty(0), None, "sum", [], ranges, table.shared_row)
        whole.pooling, whole.features = table.pooling.value.lower(), table.feature_names
        found.append(whole)
    return found


def shard(
    embeddings: MultiLayerTables,
    optimizer: str = "sgd",
    rate: float = 0.05,
    exchange: ExchangeChoice = "after",
    around: Callable[[torch.nn.Module], torch.nn.Module] = torch.nn.Sequential,
    codecs: dict[str, QuantizedCommCodecs] | None = None,
    sharding_types: Mapping[str, str] = MappingProxyType({}),
    kernels: Sequence[str] = (),
) -> DistributedModelParallel:
    """Shard the collection, wrapped by ``around``, with W1's optimizer in backward; row_wise unless given otherwise.

    ``kernels`` are the compute kernels that the planner may use.
    """
    arguments = {"lr": rate, **_eps(optimizer)}
    rows = [embeddings.row_weight(table.name) for table in embeddings.row_tables()]
    apply_optimizer_in_backward(_FUSED[optimizer], rows, arguments)
    sequences = isinstance(embeddings, MultiLayerEmbeddingCollection)
    kind = MultiLayerEmbeddingCollectionSharder if sequences else MultiLayerEmbeddingBagCollectionSharder
    sharders = [kind(exchange="auto" if sequences else exchange, qcomm_codecs_registry=codecs)]
    model = around(embeddings)
    plan = planner(embeddings, sharding_types, kernels).collective_plan(model, sharders, dist.group.WORLD)
    return DistributedModelParallel(model, device=rank_device(), plan=plan, sharders=sharders)


def planner(
    embeddings: EmbeddingBagCollection | MultiLayerTables,
    sharding_types: Mapping[str, str] = MappingProxyType({}),
    kernels: Sequence[str] = (),
) -> EmbeddingShardingPlanner:
    """Return TorchRec's planner for all ranks; tables missing from ``sharding_types`` are row_wise."""
    topology = Topology(
        world_size=dist.get_world_size(),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        compute_device=rank_device().type,
    )
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=[sharding_types.get(table.name, "row_wise")], compute_kernels=list(kernels)
        )
        for table in (
            embeddings.row_tables() if isinstance(embeddings, MultiLayerTables) else embeddings.embedding_bag_configs()
        )
    }
    return EmbeddingShardingPlanner(topology=topology, constraints=constraints)


def optimizer_of(model: DistributedModelParallel, name: str, rates: dict[str, float]) -> CombinedOptimizer:
    """Combine the fused optimizer, that of rows without a fused kernel, and that of W2."""
    rows, projections = {}, {}
    for key, parameter in in_backward_optimizer_filter(model.named_parameters()):
        (projections if "projections" in key else rows)[key] = parameter
    forms = [(_ROWS[name], rows, rates["rows"]), (_DENSE[name], projections, rates["projections"])]
    steppers = [
        KeyedOptimizerWrapper(parameters, lambda each, kind=kind, rate=rate: kind(each, lr=rate, **_eps(name)))
        for kind, parameters, rate in forms
        if parameters
    ]
    return CombinedOptimizer([model.fused_optimizer, *steppers])


def _eps(optimizer: str) -> dict[str, Any]:
    return {} if optimizer == "sgd" else {"eps": 1e-8}


def to_kjt(bags: Bags, first: int, last: int, weighted: bool = False) -> KeyedJaggedTensor:
    """Return rows [first, last) of the bags as a KeyedJaggedTensor on the rank's device."""
    entries = [each for rows in bags.values() for ids in rows[first:last] for each in ids]
    lengths = [len(ids) for rows in bags.values() for ids in rows[first:last]]
    found = KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([each for each, _ in entries], dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        weights=torch.tensor([weight for _, weight in entries]) if weighted else None,
    )
    return found if rank_device().type == "cpu" else found.to(rank_device())


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the full tensors of the state dict of a sharded collection, on every rank; rows of W1 by id."""
    state = {name.removeprefix("0."): full_tensor(tensor) for name, tensor in model.state_dict().items()}
    return weights_by_id(state, row_tables_of(model))


def row_tables_of(model: torch.nn.Module) -> list[MultiLayerEmbeddingBagConfig]:
    """Return the tables that store the rows of all sharded collections of a model."""
    sharded = [each for each in model.modules() if isinstance(each, ShardedMultiLayerEmbeddingBagCollection)]
    return [table for each in sharded for table in each._row_tables]


def unsharded_weights(module: MultiLayerTables) -> dict[str, torch.Tensor]:
    """Return the state dict of an unsharded collection with the rows of W1 by id."""
    return weights_by_id(module.state_dict(), module.row_tables())


def weights_by_id(
    state: Mapping[str, torch.Tensor], tables: Iterable[MultiLayerEmbeddingBagConfig]
) -> dict[str, torch.Tensor]:
    """Return a state dict of full tensors of a collection, or of a model with one, with the rows of W1 by id."""
    found = dict(state)
    for table in tables:
        if table.row_order is not None:
            suffixes = tuple(f"{rows}.{table.name}.weight" for rows in ("embedding_bags", "embeddings"))
            (name,) = (each for each in state if f".{each}".endswith(tuple(f".{suffix}" for suffix in suffixes)))
            found[name] = table.row_order.from_stored(found[name])
    return found


def record_steps(
    model: DistributedModelParallel,
    stepper: CombinedOptimizer,
    batches: Iterable[KeyedJaggedTensor],
) -> dict[str, Any]:
    """Train a sharded adaptive collection on ``toy_loss``, and move its rows after each step.

    Returns:
        The ``outputs`` of each step, the ``states`` before the first and after each step, and the rows ``moved``.
    """
    outputs, states, moved = [], [full_weights(model)], []
    for batch in batches:
        stepper.zero_grad()
        found = model(batch).to_dict()
        toy_loss(found).backward()
        stepper.step()
        outputs.append({name: output.detach() for name, output in found.items()})
        moved.append(model.module[0].move_rows(stepper))
        states.append(full_weights(model))
    return {"outputs": outputs, "states": states, "moved": moved}
