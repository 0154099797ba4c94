"""Precision, compilation and determinism of training: errors that the format explains, and names and bits that stay."""

import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from mlet_dist.config.config_file import load_config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import Precision, TrainConfig
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, ExchangeChoice
from mlet_dist.errors import UserError
from mlet_dist.export.run_evaluate import evaluate_path
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.dense_arithmetic import (
    configure_cublas,
    dense_arithmetic,
    evaluation_arithmetic,
    forward_precision,
)
from mlet_dist.training.non_finite_guard import Guard, NonFinite
from mlet_dist.training.step import take_steps
from mlet_dist.training.timing import StepTimer
from tests.helpers.mlet_command import ROOT
from tests.helpers.pairwise import pairwise
from tests.helpers.precision_model import (
    UNITS,
    check_rounding,
    error_bound,
    largest_relative_error,
    train_in_precision,
)
from tests.helpers.ranks import RankPool
from tests.helpers.small_run import SETTINGS, loader, training_of
from tests.helpers.train_in_ranks import Ranks, records, stopped_after, tensors, train_in_ranks

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
CPU = torch.device("cpu")


@pytest.mark.multirank
@pytest.mark.parametrize(("world_size", "exchange", "precision"), pairwise([1, 2, 3], EXCHANGES, [*UNITS]))
def test_projections_err_by_what_their_format_rounds(
    ranks: Ranks, world_size: int, exchange: ExchangeChoice, precision: Precision
) -> None:
    check_rounding(ranks(world_size).run(train_in_precision, exchange, precision), precision)


def test_an_evaluation_between_steps_computes_in_float32_and_does_not_compile() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].compile(backend="eager")
    compiled = model[0]._compiled_call_impl
    before = torch.get_float32_matmul_precision()
    with dense_arithmetic(TrainConfig(precision="tf32"), model, CPU):
        assert torch.get_float32_matmul_precision() == "high"
        with evaluation_arithmetic(model):
            assert torch.get_float32_matmul_precision() == "highest"
            assert model[0]._compiled_call_impl is None
        assert torch.get_float32_matmul_precision() == "high"
        assert model[0]._compiled_call_impl is compiled
    assert torch.get_float32_matmul_precision() == before


def _positive_model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a DLRM with positive weights, dense rows and pooled vectors, so that nothing cancels."""
    spec = ModelSpec(
        ModelConfig(embedding_dim=16, hidden_dim=32, bottom_mlp=(32,), top_mlp=(64, 32)),
        ("I1", "I2"),
        tuple(SparseFeature(name, 50) for name in "ab"),
        seed=1,
    )
    model = build_training_model(spec, CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    generator = torch.Generator().manual_seed(2)
    return model, torch.rand(24, 2, generator=generator), torch.rand(24, 2, 16, generator=generator)


def _logits(model: Any, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    return model.over_arch(model.inter_arch(dense_features=model.dense_arch(dense), sparse_features=sparse))


@pytest.mark.parametrize("precision", UNITS)
def test_dense_layers_err_by_what_their_format_rounds(precision: Precision) -> None:
    model, dense, sparse = _positive_model()
    exact = copy.deepcopy(model).double()
    expected = _logits(exact, dense.double(), sparse.double())
    expected.sum().backward()
    with dense_arithmetic(TrainConfig(precision=precision), model, CPU), forward_precision(precision, CPU):
        logits = _logits(model, dense, sparse)
        assert logits.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    logits.float().sum().backward()
    # A linear layer rounds its input, its weights and its output. The interaction multiplies two outputs of the dense
    # arch of 2 layers, 6 roundings each, and adds 3; the over arch has 3 layers.
    forward = 2 * 6 + 3 + 9
    error = largest_relative_error(logits.detach(), expected.detach())
    assert error <= error_bound(forward, precision)
    if precision == "bf16":
        assert error > UNITS["bf16"] / 4
    for (name, found), of_exact in zip(model.named_parameters(), exact.parameters(), strict=True):
        if found.grad is None:
            continue
        assert found.grad.dtype == torch.float32
        # Backward has as many products as forward, and each takes a factor from there.
        assert largest_relative_error(found.grad, of_exact.grad) <= error_bound(3 * forward, precision), name


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("fails", [False, True])
def test_settings_of_torch_are_restored(precision: Precision, fails: bool) -> None:
    config, model = TrainConfig(precision=precision, deterministic=True), nn.Linear(2, 2)
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        with dense_arithmetic(config, model, CPU):
            assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_cublas_is_configured_where_the_user_has_not_done_it() -> None:
    with mock.patch.dict(os.environ):
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        configure_cublas(TrainConfig())
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        configure_cublas(TrainConfig(deterministic=True))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        configure_cublas(TrainConfig(deterministic=True))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_machine_that_cannot_compile_is_one_error() -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler\nand pages of text")

    config = TrainConfig(compile=True)
    message = r"^train\.compile is true, .*: no compiler; it needs a C\+\+ compiler .*, or set train\.compile=false$"
    with (
        mock.patch.object(torch, "compile", return_value=fails),
        pytest.raises(UserError, match=message),
        dense_arithmetic(config, nn.Identity(), CPU),
    ):
        pass


def _train_on_a_bad_batch(directory: str, small_model: tuple[str, ...], pipelined: bool) -> str:
    config = load_config(CONFIG, [*small_model, *SETTINGS, f"run.dir={directory}", "train.precision=bf16"])
    training, _ = training_of(config, 8)

    def batches() -> Any:
        for number, batch in enumerate(loader(config)):
            if number == 3:
                batch.dense[2, 5] = math.inf
            yield batch

    with StepTimer(training.model, CPU, 1) as timer, pytest.raises(NonFinite) as raised:
        for _ in take_steps(training, batches(), CPU, Guard(training, CPU, "stop", 0), timer, pipelined=pipelined):
            pass
    return str(raised.value)


@pytest.mark.multirank
def test_the_guard_finds_the_batch_under_bf16(ranks: Ranks, small_model: tuple[str, ...], tmp_path: Path) -> None:
    for pipelined in (False, True):
        for error in ranks(2).run(_train_on_a_bad_batch, str(tmp_path), small_model, pipelined):
            assert error.startswith("the training loss of step 4 is not finite")


def _settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    optimizer = ("optimizer.name=adagrad", "optimizer.learning_rate=0.05")
    return (*small_model, *optimizer, "train.max_steps=24", "train.checkpoint_every=12", "train.keep_last=3")


@pytest.mark.multirank
def test_a_run_in_bf16_resumes_bitwise_and_is_evaluated_in_float32(
    ranks: Ranks, small_model: tuple[str, ...], small_data: Path, tmp_path: Path
) -> None:
    settings, whole = (*_settings(small_model), "train.precision=bf16"), tmp_path / "whole"
    result = train_in_ranks(ranks, 2, *settings, f"run.dir={whole}")
    exact = train_in_ranks(ranks, 2, *_settings(small_model), f"run.dir={tmp_path / 'exact'}")
    assert result["weights_sha256"] != exact["weights_sha256"]
    assert result["valid_logloss"] == pytest.approx(exact["valid_logloss"], abs=0.01)
    resumed = stopped_after(12, whole, tmp_path / "resumed")
    again = train_in_ranks(ranks, 2, *settings, f"run.dir={resumed}")
    assert again["first_step"] == 12
    assert again["weights_sha256"] == result["weights_sha256"]
    assert records(resumed) == records(whole)
    for name, tensor in tensors(whole, 24, tmp_path).items():
        assert not tensor.is_floating_point() or tensor.dtype == torch.float32, name
    found = evaluate_path(whole, data_set_path(str(small_data)), "valid", 250)  # on one rank, and without the setting
    assert found["auc"] == pytest.approx(result["valid_auc"], abs=1e-6)
    assert found["logloss"] == pytest.approx(result["valid_logloss"], abs=1e-6)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("exchange", "optimizer"), [("after", "adagrad"), ("reduce_scatter", "adam"), ("unique_rows", "adagrad")]
)
def test_deterministic_algorithms_are_those_of_a_cpu(
    ranks: Ranks, small_model: tuple[str, ...], tmp_path: Path, exchange: str, optimizer: str
) -> None:
    settings = (*small_model, f"sharding.exchange={exchange}", f"optimizer.name={optimizer}", "train.max_steps=9")
    found = {
        train_in_ranks(ranks, 2, *settings, f"run.dir={tmp_path / str(each)}", f"train.deterministic={each}")[
            "weights_sha256"
        ]
        for each in ("true", "false")
    }
    assert len(found) == 1


@pytest.fixture
def patient_rank() -> Iterator[Ranks]:
    """One rank that may take minutes for a compilation, as it does where other processes use the cores, too."""
    pool = RankPool(1, timeout_s=1200)
    yield lambda *_: pool
    pool.close()


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "In file included from a.h:1:\nb.h:3:10: fatal error: omp.h: No such file\n",
            "b.h:3:10: fatal error: omp.h: No",
        ),
        ("", "the compiler printed nothing, as when a signal ends it"),
    ],
)
def test_a_compiler_that_fails_is_quoted(output: str, reason: str) -> None:
    text = f"CppCompileError: C++ compile error\n\nCommand:\ng++ a.h\n\nOutput:\n{output}\n\nSet TORCHDYNAMO_VERBOSE=1"
    with (
        mock.patch("torch.compile", side_effect=RuntimeError(text)),
        pytest.raises(UserError, match=f"CppCompileError: C\\+\\+ compile error.*{reason}.*needs a C\\+\\+ compiler"),
        dense_arithmetic(TrainConfig(compile=True), nn.Linear(2, 2), CPU),
    ):
        pass


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_layers_train_the_same_weights_under_the_same_names(
    patient_rank: Ranks, small_model: tuple[str, ...], tmp_path: Path, precision: Precision
) -> None:
    # Not Adagrad, whose first steps move a weight by the learning rate, even if its gradient is mostly rounding.
    sgd = ("optimizer.name=sgd", "optimizer.learning_rate=0.2")
    settings = (*_settings(small_model), *sgd, "train.pipelined=true", f"train.precision={precision}")
    if precision == "bf16":  # each further layer takes many seconds to compile
        settings += ("model.bottom_mlp=[]",)
    runs = {name: tmp_path / name for name in ("compiled", "eager")}
    for name, run in runs.items():
        compiled = f"train.compile={str(name == 'compiled').lower()}"
        train_in_ranks(patient_rank, 1, *settings, f"run.dir={run}", compiled)
    resumed = stopped_after(12, runs["compiled"], tmp_path / "resumed")
    assert train_in_ranks(patient_rank, 1, *settings, f"run.dir={resumed}", "train.compile=true")["first_step"] == 12
    assert _fingerprint(resumed) == _fingerprint(runs["compiled"])
    found, expected = (tensors(run, 24, tmp_path) for run in runs.values())
    assert found.keys() == expected.keys()
    if precision == "bf16":  # a compiled layer does not round between its operations
        return
    for name, tensor in expected.items():
        # Additions in another order change each step by some units in the last place.
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    # A run may resume without the setting.
    eager = stopped_after(12, runs["compiled"], tmp_path / "eager again")
    assert train_in_ranks(patient_rank, 1, *settings, f"run.dir={eager}")["first_step"] == 12


def _fingerprint(run: Path) -> str:
    found: str = json.loads((run / "summary.json").read_text())["weights_sha256"]
    return found
