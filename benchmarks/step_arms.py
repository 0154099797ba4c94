"""The models that benchmarks/step.py compares, each as an endless iterator whose every element is one step.

``plain_single`` and ``plain_mlet`` are written in PyTorch alone: an ``nn.EmbeddingBag`` for each table, for MLET an
``nn.Linear`` behind it, sparse gradients and one torch optimizer. On several ranks DDP combines the dense gradients,
and one sparse all-reduce those of all tables. (DDP by itself starts one for each table without waiting for the one
before: with torch 2.13 and gloo that has crashed by a damaged heap.)

``single`` and ``single_planned`` are TorchRec alone: its own collection, sharded row_wise and as its planner decides,
with its DistributedModelParallel, fused optimizers and, on several ranks or CUDA, its pipeline.

The others take the steps of `mlet train`: ``take_steps``, with its guard, timers and training metrics. ``mlet_single``
has ``model.hidden_dim: null``, ``composed`` is MLET with W2 behind TorchRec's exchange (``after``), and ``mlet`` is
MLET as `mlet train` plans it.

Not included are the loader, whose threads work beside a step, and what happens every few steps: records, checkpoints.
"""

from collections.abc import Callable, Generator
from itertools import accumulate, cycle, pairwise
from typing import Any

import torch
from step_cases import Case, Sizes, spec_of
from torch import distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.utils import none_throws
from torchrec.models.dlrm import DLRM, DenseArch, InteractionArch, OverArch
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.config.sharding_section import ShardingConfig
from mlet_dist.data.loading.loader import Batch
from mlet_dist.models.build import Collections, build_around, build_serving_model, build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.binary_metrics import BinaryMetrics
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.non_finite_guard import Finding, Guard
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.state import Training
from mlet_dist.training.step import pipeline_is_faster, take_steps
from mlet_dist.training.timing import StepTimer

Steps = Generator[None, None, None]

_RATE = 0.01
_PROGRESS_BINS = 1 << 16


class AnyDeviceSharder(EmbeddingBagCollectionSharder):
    """TorchRec's own sharder, but with row_wise sharding on every device; TorchRec offers it on CUDA only."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise"]


class PlainDlrm(nn.Module):
    """DLRM in PyTorch alone, with the dense layers and the interaction of TorchRec's DLRM."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width, dim = spec.model.hidden_dim, spec.model.embedding_dim
        rows = [table.num_embeddings for table in spec.tables]
        self.tables = nn.ModuleList(nn.EmbeddingBag(number, width or dim, mode="sum", sparse=True) for number in rows)
        self.projections = nn.ModuleList(nn.Linear(width, dim, bias=False) for _ in rows) if width else None
        interactions = dim + (len(rows) + 1) * len(rows) // 2
        self.dense_arch = DenseArch(len(spec.dense), [*spec.model.bottom_mlp, dim])
        self.inter_arch = InteractionArch(len(rows))
        self.over_arch = OverArch(interactions, [*spec.model.top_mlp, 1])

    def forward(self, dense: torch.Tensor, bags: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Return logits ``(b,)``; ``bags`` has ids and offsets of each table."""
        pooled = [table(ids, offsets) for table, (ids, offsets) in zip(self.tables, bags, strict=True)]
        if self.projections is not None:
            pooled = [layer(each) for layer, each in zip(self.projections, pooled, strict=True)]
        logits: torch.Tensor = self.over_arch(self.inter_arch(self.dense_arch(dense), torch.stack(pooled, dim=1)))
        return logits.squeeze(-1)


def plain_steps(case: Case, sizes: Sizes, batches: list[Batch], worker: Worker, *, single: bool) -> Steps:
    """Train a ``PlainDlrm`` without end."""
    model: nn.Module = PlainDlrm(spec_of(case, sizes, single_layer=single)).to(worker.device)
    tables = [table.weight for table in model.modules() if isinstance(table, nn.EmbeddingBag)]
    if worker.world_size > 1:
        names = [name for name, weight in model.named_parameters() if any(weight is table for table in tables)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for table in tables:  # as DDP does with the weights that it is not told to ignore
            dist.broadcast(table.data, 0)
    kind = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.Adagrad
    optimizer = kind(model.parameters(), lr=_RATE)
    prepared = [(batch.dense, _bags(batch.sparse), batch.labels) for batch in batches]
    for dense, bags, labels in cycle(prepared):
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(model(dense, bags), labels).backward()
        if worker.world_size > 1:
            _combine_sparse_gradients(tables, worker)
        optimizer.step()
        yield


def _combine_sparse_gradients(tables: list[torch.Tensor], worker: Worker) -> None:
    """Replace the gradients of all tables by their mean over the ranks."""
    combined = torch.cat([none_throws(table.grad) for table in tables])
    dist.all_reduce(combined)
    combined = combined.coalesce()
    (rows,), values = combined.indices(), combined.values() / worker.world_size
    first_rows = torch.tensor([0, *accumulate(len(table) for table in tables)], device=rows.device)
    firsts = torch.searchsorted(rows, first_rows).tolist()
    for table, first_row, (start, stop) in zip(tables, first_rows.tolist(), pairwise(firsts), strict=False):
        of_table = (rows[start:stop] - first_row).unsqueeze(0)
        table.grad = torch.sparse_coo_tensor(of_table, values[start:stop], table.shape, is_coalesced=True)


def _bags(features: KeyedJaggedTensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    keys = features.keys()
    return [(features[key].values(), features[key].offsets()[:-1].clone()) for key in keys]


def torchrec_steps(
    case: Case, sizes: Sizes, batches: list[Batch], worker: Worker, *, sharder: EmbeddingBagCollectionSharder
) -> Steps:
    """Train TorchRec's own collection without end, sharded as TorchRec plans among what ``sharder`` offers."""
    spec = spec_of(case, sizes, single_layer=True)
    configs = build_serving_model(spec).sparse_arch.embedding_bag_collection.embedding_bag_configs()
    model = build_around(Collections(EmbeddingBagCollection(configs, device=torch.device("meta"))), spec)
    fuse_row_optimizer(model, OptimizerConfig(name=case.optimizer, learning_rate=_RATE))
    topology = Topology(
        world_size=worker.world_size, local_world_size=worker.local_world_size, compute_device=worker.device.type
    )
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=case.batch_size)
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=worker.device, plan=plan, sharders=[sharder])
    sharded.train()
    kind = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.Adagrad
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    parts = [sharded.fused_optimizer, KeyedOptimizerWrapper(dense, lambda parameters: kind(parameters, lr=_RATE))]
    optimizer = CombinedOptimizer(parts)

    def forward(batch: Batch) -> tuple[torch.Tensor, None]:
        logits = sharded(batch.dense, batch.sparse).squeeze(-1)
        return functional.binary_cross_entropy_with_logits(logits, batch.labels), None

    if pipeline_is_faster(worker):
        pipeline = TrainPipelineSparseDist(sharded, optimizer, worker.device, custom_model_fwd=forward)
        prepared = cycle(batches)
        while True:
            pipeline.progress(prepared)
            yield
    for batch in cycle(batches):
        optimizer.zero_grad()
        forward(batch)[0].backward()
        optimizer.step()
        yield


def mlet_steps(
    case: Case, sizes: Sizes, batches: list[Batch], worker: Worker, *, single: bool, exchange: Any = "auto"
) -> Steps:
    """Train without end as `mlet train` does."""
    spec = spec_of(case, sizes, single_layer=single)
    model: DLRM = build_training_model(spec, torch.device("meta"))
    config = OptimizerConfig(name=case.optimizer, learning_rate=_RATE)
    fuse_row_optimizer(model, config)
    sharding = ShardingConfig(exchange=exchange)
    sharded, _ = shard_model(model, worker, case.batch_size, sharding, spec.pooling_factors)
    sharded.train()
    rows = case.batch_size * case.ranks
    training = Training(
        sharded,
        build_optimizer(sharded, config),
        BinaryMetrics(worker.device, _PROGRESS_BINS),
        steps=1 << 30,
        batches_per_epoch=1 << 30,
        batch_size=rows,
        rows_per_epoch=rows,
    )
    guard = Guard(training, worker.device, "stop", 0)
    timer = StepTimer(sharded, worker.device, case.batch_size)
    pipelined = pipeline_is_faster(worker)
    for outcome in take_steps(training, cycle(batches), worker.device, guard, timer, pipelined=pipelined):
        if not isinstance(outcome, Finding):
            training.metrics.update(*outcome)
        yield


Arm = Callable[[Case, Sizes, list[Batch], Worker], Steps]
ARMS: dict[str, Arm] = {
    "plain_single": lambda *given: plain_steps(*given, single=True),
    "plain_mlet": lambda *given: plain_steps(*given, single=False),
    "single": lambda *given: torchrec_steps(*given, sharder=AnyDeviceSharder()),
    "single_planned": lambda *given: torchrec_steps(*given, sharder=EmbeddingBagCollectionSharder()),
    "mlet_single": lambda *given: mlet_steps(*given, single=True),
    "composed": lambda *given: mlet_steps(*given, single=False, exchange="after"),
    "mlet": lambda *given: mlet_steps(*given, single=False),
}
"""The models by name, in the order of the report."""
