"""Every optimizer, fused and unfused: the same update rule and the same state on any number of ranks."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from mlet_dist.checkpoint.load import MODEL_KEY, OPTIMIZER_KEY, latest_finished, load_model, load_state
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.checkpoint.writer import write_checkpoint
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.config.sharding_section import ShardingConfig, TableShardingConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings import LazyAdam, StepCountingOptimizer
from mlet_dist.embeddings.adam import fused_kernels
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.fused_optimizers import (
    build_optimizer,
    fuse_row_optimizer,
    optimizer_state,
)
from mlet_dist.training.process_group import Worker
from mlet_dist.training.replicated_gradients import ReplicatedGradients
from mlet_dist.training.sharding import shard_model
from tests.helpers.mlet_command import ROOT, mlet_json
from tests.helpers.ranks import RankPool, full_tensor
from tests.helpers.sharded_module import row_tables_of, weights_by_id

Ranks = Callable[..., RankPool]
OPTIMIZERS = ["sgd", "adagrad", "rowwise_adagrad", "adam"]
# Replicated on 4 ranks: tiny, two; on 3: two; on 1 and 2: none.
SIZES = {"uneven": 101, "tiny": 5, "two": 2}
STATES: dict[str, set[str]] = {
    "sgd": set(),
    "adagrad": {"sum"},
    "rowwise_adagrad": {"sum"},
    "adam": {"exp_avg", "exp_avg_sq", "step"},
}
BATCH = 12
Trained = dict[str, dict[str, torch.Tensor]]


def _build(config: OptimizerConfig, kind: str = "row_wise") -> tuple[DistributedModelParallel, CombinedOptimizer]:
    model_config = ModelConfig(embedding_dim=4, hidden_dim=8, bottom_mlp=(6,), top_mlp=(6,))
    spec = ModelSpec(model_config, ("I1", "I2"), tuple(SparseFeature(*each) for each in SIZES.items()), seed=3)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    worker = Worker(dist.get_rank(), dist.get_world_size(), local, torch.device("cpu"))
    model = build_training_model(spec, tables_device=torch.device("meta"))
    fuse_row_optimizer(model, config)
    blocks = {"row_wise": worker.world_size, "table_row_wise": local}.get(kind, 1)
    every_block_has_rows = {name: -(-rows // blocks) * (blocks - 1) < rows for name, rows in SIZES.items()}
    kinds = {name: kind if enough else "data_parallel" for name, enough in every_block_has_rows.items()}
    sharding = ShardingConfig(tables={name: TableShardingConfig(sharding_types=(kinds[name],)) for name in SIZES})
    sharded, _ = shard_model(model, worker, BATCH // worker.world_size, sharding)
    return sharded, build_optimizer(sharded, config)


def _batch(step: int) -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]:
    """A rank's share; the last row of each table is looked up in step 0 alone."""
    share = BATCH // dist.get_world_size()
    rows = torch.arange(BATCH)[dist.get_rank() * share :][:share]
    ids = torch.cat([(n - 1 - rows * 7 % n) if step == 0 else (rows * 5 + step) % (n - 1) for n in SIZES.values()])
    features = KeyedJaggedTensor(list(SIZES), ids, lengths=torch.ones(len(ids), dtype=torch.int64))
    dense = torch.stack([rows + 1.0, rows + step + 0.5], dim=1) / BATCH
    return dense, features, (rows % 3 == 0).float()


def _take_steps(model: DistributedModelParallel, optimizer: CombinedOptimizer, steps: range) -> None:
    gradients = ReplicatedGradients(model)
    for step in steps:
        dense, features, labels = _batch(step)
        optimizer.zero_grad()
        logits = model(dense, features).squeeze(-1)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        gradients.combine()
        optimizer.step()


def _evaluate(model: DistributedModelParallel) -> None:
    model.eval()
    with torch.no_grad():
        model(*_batch(0)[:2])
    model.train()


def _whole_state(optimizer: CombinedOptimizer) -> Trained:
    state = optimizer_state(optimizer)
    return {name: {key: full_tensor(tensor) for key, tensor in found.items()} for name, found in state.items()}


def _whole_weights(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    state = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
    return weights_by_id(state, row_tables_of(model))


def _train(
    name: str,
    steps: range,
    save: Path | None = None,
    load: Path | None = None,
    evaluate: bool = False,
    kind: str = "row_wise",
) -> tuple[dict[str, torch.Tensor], Trained]:
    """Weights and optimizer state after some steps, from the start or from a checkpoint.

    The state of a table that some ranks hold nothing of is those of its owners alone, and is left out.
    """
    config = OptimizerConfig(name=name, learning_rate=0.01)  # type: ignore[arg-type]
    model, optimizer = _build(config, kind)
    if load is not None:
        location = latest_finished(CheckpointStore(load))[0].location
        load_model(model, location)
        load_state({OPTIMIZER_KEY: optimizer_state(optimizer)}, location)
    for step in steps:
        if evaluate:
            _evaluate(model)
        _take_steps(model, optimizer, range(step, step + 1))
    if save is not None:
        state = {MODEL_KEY: model.state_dict(), OPTIMIZER_KEY: optimizer_state(optimizer)}
        write_checkpoint(CheckpointStore(save).checkpoint(steps.stop), state, {})
    return _whole_weights(model), {} if kind.startswith("table") else _whole_state(optimizer)


@pytest.mark.multirank
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_that_is_not_looked_up_does_not_change(ranks: Ranks, name: str) -> None:
    (first, _), (later, _) = (ranks(4).run(_train, name, range(steps))[0] for steps in (1, 4))
    for table, rows in SIZES.items():
        key = next(each for each in first if each.endswith(f"embedding_bags.{table}.weight"))
        assert torch.equal(later[key][rows - 1], first[key][rows - 1]), table
        moved = min(1, rows - 2)
        assert not torch.equal(later[key][moved], first[key][moved]), table


@pytest.mark.multirank
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_has_the_same_names_and_shapes_on_any_number_of_ranks(ranks: Ranks, name: str) -> None:
    (one_weights, one), (four_weights, four) = (ranks(size).run(_train, name, range(3))[0] for size in (1, 4))
    assert set(four) == set(one)
    assert {key for states in one.values() for key in states} == STATES[name]
    if name != "sgd":
        assert set(one) == set(one_weights)
    for parameter, states in one.items():
        assert set(four[parameter]) == set(states) == STATES[name], parameter
        for key, tensor in states.items():
            assert four[parameter][key].shape == tensor.shape, (parameter, key)
            torch.testing.assert_close(four[parameter][key], tensor, rtol=1e-4, atol=1e-7)
            if "embedding_bags" in parameter and key != "step":
                rows = SIZES[parameter.split(".")[-2]]
                assert tensor.shape == ((rows,) if name == "rowwise_adagrad" else (rows, 8)), parameter
    for parameter, weight in one_weights.items():
        torch.testing.assert_close(four_weights[parameter], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.multirank
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_from_a_checkpoint_of_another_number_of_ranks(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """With another number of ranks other tables are replicated, and then another optimizer steps them."""
    expected, expected_state = ranks(4).run(_train, name, range(6))[0]
    _, saved = ranks(4).run(_train, name, range(2), tmp_path / "4")[0]
    _, loaded = ranks(1).run(_train, name, range(2, 2), None, tmp_path / "4")[0]
    for parameter, states in saved.items():
        for key, tensor in states.items():
            assert torch.equal(loaded[parameter][key], tensor), (parameter, key)
    ranks(1).run(_train, name, range(2, 4), tmp_path / "1", tmp_path / "4")
    for found, state in ranks(4).run(_train, name, range(4, 6), None, tmp_path / "1"):
        for parameter, weight in expected.items():
            torch.testing.assert_close(found[parameter], weight, rtol=1e-5, atol=1e-6)
        if name == "adam":
            assert {int(each["step"]) for each in state.values()} == {6}
        assert set(state) == set(expected_state)


@pytest.mark.multirank
@pytest.mark.parametrize("kind", ["table_wise", "table_row_wise", "data_parallel"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_from_a_checkpoint_of_another_sharding_type(
    ranks: Ranks, tmp_path: Path, name: str, kind: str
) -> None:
    """2 nodes of 2, from and to row_wise tables of one rank."""
    nodes = ranks(4, 2)
    expected, expected_state = ranks(1).run(_train, name, range(4), tmp_path / "rows")[0]
    nodes.run(_train, name, range(2), tmp_path / kind, None, False, kind)
    found, state = ranks(1).run(_train, name, range(2, 4), None, tmp_path / kind)[0]
    assert set(state) == set(expected_state)
    for parameter, states in expected_state.items():
        for key, tensor in states.items():
            torch.testing.assert_close(state[parameter][key], tensor, rtol=1e-4, atol=1e-7)
    back, _ = nodes.run(_train, name, range(4, 6), None, tmp_path / "rows", False, kind)[0]
    later, _ = ranks(1).run(_train, name, range(4, 6), None, tmp_path / "rows")[0]
    for parameter, weight in expected.items():
        torch.testing.assert_close(found[parameter], weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(back[parameter], later[parameter], rtol=1e-5, atol=1e-6)


@pytest.mark.multirank
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluating_between_steps_changes_nothing(ranks: Ranks, name: str) -> None:
    (plain, state), (evaluated, evaluated_state) = (
        ranks(2).run(_train, name, range(3), None, None, evaluate)[0] for evaluate in (False, True)
    )
    for parameter, weight in plain.items():
        assert torch.equal(evaluated[parameter], weight), parameter
    for parameter, states in state.items():
        for key, tensor in states.items():
            assert torch.equal(evaluated_state[parameter][key], tensor), (parameter, key)


def _kernel_counts() -> list[tuple[set[int], set[int]]]:
    """What fbgemm's kernels count, from step 5 on, evaluating before each; the row-wise Adagrad counts as Adam does."""
    model, optimizer = _build(OptimizerConfig(name="rowwise_adagrad"))
    kernels = list(fused_kernels(model))
    assert kernels
    counting = StepCountingOptimizer(model.fused_optimizer, model)
    combined = CombinedOptimizer([counting, *(part for _, part in optimizer.optimizers[1:])])
    counting.steps.fill_(5)  # as a checkpoint's load does
    counts = []
    for step in range(3):
        _evaluate(model)
        _take_steps(model, combined, range(step, step + 1))
        counts.append(({int(kernel.iter_cpu) for kernel in kernels}, {int(kernel.iter) for kernel in kernels}))
    steps = {int(states["step"]) for states in counting.state_dict()["state"].values()}
    assert steps == {8}
    return counts


@pytest.mark.multirank
def test_fused_kernels_count_steps_and_not_forward_passes(ranks: Ranks) -> None:
    for counts in ranks(2).run(_kernel_counts):
        assert counts == [({6}, {6}), ({7}, {7}), ({8}, {8})]


def test_fused_adam_has_the_names_of_lazy_adam() -> None:
    """TorchRec's names, as they are where fbgemm has the kernel: on CUDA."""
    weight, mean, square = (torch.ones(2, 4) for _ in range(3))
    states = {"t.momentum1": mean, "t.exp_avg_sq": square}
    fused = StepCountingOptimizer(
        KeyedOptimizer({"t": weight}, {weight: states}, [{"params": [weight]}]), torch.nn.Identity()
    )
    found = optimizer_state(CombinedOptimizer([fused]))["t"]
    assert set(found) == STATES["adam"]
    assert found["exp_avg"] is mean
    assert found["exp_avg_sq"] is square
    assert found["step"] is fused.steps


def _rates(config: OptimizerConfig) -> list[tuple[dict[str, float], set[float]]]:
    """The rate by parameter, and that in the fused kernels' backward, in two steps with a factor of 1 and 0.5."""
    model, optimizer = _build(config)
    schedule = LambdaLR(optimizer, lambda done: 0.5**done)
    kernels = list(fused_kernels(model))
    found = []
    for step in range(2):
        _take_steps(model, optimizer, range(step, step + 1))
        names = {id(parameter): name for name, parameter in optimizer.params.items()}
        rates = {names[id(each)]: group["lr"] for group in optimizer.param_groups for each in group["params"]}
        found.append((rates, {kernel.get_learning_rate() for kernel in kernels}))
        schedule.step()
    return found


@pytest.mark.multirank
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_projections_and_dense_layers_have_separate_learning_rates(ranks: Ranks, name: str) -> None:
    config = OptimizerConfig(name, 0.125, rows_learning_rate=0.5, projections_learning_rate=0.25)  # type: ignore[arg-type]
    for world_size in (1, 4):
        for step, (rates, fused) in enumerate(ranks(world_size).run(_rates, config)[0]):
            factor = 0.5**step
            assert len(rates) == 3 + 3 + 8
            for parameter, rate in rates.items():
                kind = "rows" if ".embedding_bags." in parameter else "W2" if ".projections." in parameter else "dense"
                assert rate == {"rows": 0.5, "W2": 0.25, "dense": 0.125}[kind] * factor, parameter
            assert fused == (set() if name == "adam" else {0.5 * factor})


def _w2_and_rows(name: str, rate: float) -> dict[str, torch.Tensor]:
    config = OptimizerConfig(name, 0.125, projections_learning_rate=rate)  # type: ignore[arg-type]
    model, optimizer = _build(config)
    before = {name: tensor.clone() for name, tensor in _whole_weights(model).items()}
    _take_steps(model, optimizer, range(3))
    return {name: tensor - before[name] for name, tensor in _whole_weights(model).items()}


@pytest.mark.multirank
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_w2_keeps_its_initial_values_at_rate_0(ranks: Ranks, name: str) -> None:
    for rate, changes in ((0.0, False), (0.25, True)):
        for parameter, change in ranks(2).run(_w2_and_rows, name, rate)[0].items():
            assert bool(change.any()) is (changes or ".projections." not in parameter), parameter


def _steps_of(gradients: list[torch.Tensor], optimizer: Callable[[Any], torch.optim.Optimizer]) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(3, 4))
    stepped = optimizer([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        stepped.step()
    return weight.detach()


def _gradients(still: int | None = None) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        gradient = torch.rand(3, 4, dtype=torch.float64, generator=generator) - 0.5
        if still is not None:
            gradient[still] = 0
        yield gradient


def test_lazy_adam_is_adam_where_every_row_has_a_gradient() -> None:
    gradients = list(_gradients())
    lazy, adam = (_steps_of(gradients, kind) for kind in (LazyAdam, torch.optim.Adam))
    torch.testing.assert_close(lazy, adam, rtol=1e-12, atol=1e-12)


def test_lazy_adam_counts_the_steps_in_which_a_row_did_not_change() -> None:
    gradients = list(_gradients())
    gradients[0][1] = gradients[1][1] = gradients[3][1] = 0
    weight = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(3, 4)[1]
    mean, square = 0.1 * gradients[2][1], 0.001 * gradients[2][1] ** 2
    weight = weight - 1e-3 * (mean / (1 - 0.9**3)) / ((square / (1 - 0.999**3)).sqrt() + 1e-8)
    mean, square = 0.9 * mean + 0.1 * gradients[4][1], 0.999 * square + 0.001 * gradients[4][1] ** 2
    weight = weight - 1e-3 * (mean / (1 - 0.9**5)) / ((square / (1 - 0.999**5)).sqrt() + 1e-8)
    found = _steps_of(gradients, LazyAdam)
    torch.testing.assert_close(found[1], weight, rtol=1e-12, atol=1e-12)
    others = [0, 2]
    torch.testing.assert_close(found[others], _steps_of(gradients, torch.optim.Adam)[others], rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_lazy_adam_is_the_fused_kernel_of_fbgemm() -> None:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(3, 4, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=EmbOptimType.ADAM,
        learning_rate=1e-3,
        eps=1e-8,
        beta1=0.9,
        beta2=0.999,
    )
    kernel.split_embedding_weights()[0].copy_(torch.linspace(0.5, 1.5, 12).view(3, 4))
    gradients = list(_gradients())
    gradients[1][1] = gradients[3][1] = 0
    for gradient in gradients:
        rows = gradient.any(dim=1).nonzero().squeeze(1).cuda()
        offsets = torch.arange(len(rows) + 1, device="cuda")
        kernel(rows, offsets).backward(gradient.float().cuda()[rows])
    found = kernel.split_embedding_weights()[0].cpu().double()
    torch.testing.assert_close(found, _steps_of(gradients, LazyAdam), rtol=2e-6, atol=2e-6)


@pytest.mark.e2e
def test_the_schedule_of_a_run_is_in_its_records(small_model: tuple[str, ...], tmp_path: Path) -> None:
    settings = ["optimizer.name=adam", "optimizer.learning_rate=0.01", "optimizer.warmup_steps=20"]
    settings += ["optimizer.decay=linear", "optimizer.decay_start=30", "train.max_steps=40", "train.log_every=10"]
    run = tmp_path / "run"
    mlet_json("train", ROOT / "configs" / "demo.yaml", *small_model, *settings, f"run.dir={run}", "--nproc", 2)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records if record["split"] == "train"]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.001])


@pytest.mark.e2e
def test_the_first_step_of_a_run_uses_the_rate_of_its_schedule(small_model: tuple[str, ...], tmp_path: Path) -> None:
    prints = {
        mlet_json(
            "train",
            ROOT / "configs" / "demo.yaml",
            *small_model,
            "optimizer.name=rowwise_adagrad",
            *settings,
            "train.max_steps=1",
            f"run.dir={tmp_path / settings[0]}",
        )["weights_sha256"]
        for settings in (
            ("optimizer.learning_rate=0.05",),
            ("optimizer.learning_rate=0.2", "optimizer.warmup_steps=4"),
        )
    }
    assert len(prints) == 1


def test_the_rows_of_a_plain_collection_are_updated_in_backward_too() -> None:
    """So that TorchRec's own tables are trained by the same rules, as the arms of benchmarks/step.py are."""
    config = EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"])
    plain = torch.nn.Sequential(EmbeddingBagCollection([config]), torch.nn.Linear(4, 1))
    fuse_row_optimizer(plain, OptimizerConfig(name="adagrad", learning_rate=0.5))
    fused = [name for name, each in plain.named_parameters() if hasattr(each, "_in_backward_optimizers")]
    assert fused == ["0.embedding_bags.t.weight"]
