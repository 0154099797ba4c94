"""A loss or gradient that is not finite on one rank of two: both ranks stop, skip or roll back, in both loops."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.data.loading.loader import Batch
from mlet_dist.training.fused_optimizers import optimizer_state
from mlet_dist.training.non_finite_guard import Finding, Guard, NonFinite
from mlet_dist.training.schedule import LearningRates
from mlet_dist.training.step import take_steps
from mlet_dist.training.timing import StepTimer
from tests.helpers.mlet_command import ROOT, mlet
from tests.helpers.pairwise import pairwise
from tests.helpers.ranks import RankPool
from tests.helpers.small_run import SETTINGS, loader, local, training_of
from tests.helpers.train_in_ranks import records, stopped_after, train_in_ranks

Ranks = Callable[[int], RankPool]
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
DEVICE = torch.device("cpu")
STEPS = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A run whose second rank has a value that is not finite at ``step``, counted from 1."""

    config: Config
    pipelined: bool
    policy: str = "stop"
    step: int = 4
    where: str = "label"
    limit: int = 10
    left_out: tuple[int, ...] = ()
    passed_over: tuple[int, ...] = ()


def _batches(case: Case) -> Iterator[Batch]:
    for number, batch in enumerate(islice(loader(case.config), STEPS), start=1):
        if number in case.left_out:
            continue
        if number == case.step and dist.get_rank() == 1:
            if case.where == "label":
                batch.labels[3] = math.nan
            elif case.where == "feature":
                batch.dense[2, 5] = math.inf
        yield batch


def _train(case: Case) -> dict[str, Any]:
    """Return outcomes and the error, if any; then weights and states, and whether the model was restored."""
    training, embeddings = training_of(case.config, STEPS)
    model = training.model.train()
    training.excluded_steps = set(case.passed_over)
    rates = LearningRates(case.config.optimizer, training)
    guard = Guard(training, DEVICE, case.policy, case.limit)
    used: list[float] = []
    skipped: list[Finding] = []
    error = None
    own_forward = embeddings.forward
    if case.where == "gradient" and dist.get_rank() == 1:
        bias = dict(model.named_parameters())["over_arch.model.1.bias"]
        bias.register_hook(lambda gradient: gradient * math.nan if training.step + 1 == case.step else gradient)
    with StepTimer(model, DEVICE, 1) as timer:
        outcomes = take_steps(training, _batches(case), DEVICE, guard, timer, pipelined=case.pipelined)
        rate = training.optimizer.param_groups[-1]["lr"]
        try:
            for outcome in outcomes:
                if isinstance(outcome, Finding):
                    skipped.append(outcome)
                else:
                    used.append(rate)
                rates(training)
                rate = training.optimizer.param_groups[-1]["lr"]
            guard.flush()
        except NonFinite as found:
            error = found
    assert embeddings.forward == own_forward
    dist.barrier()
    assert training.skipped == len(skipped)
    weights = {name: local(tensor) for name, tensor in model.state_dict().items()}
    states = {
        f"{name} {key}": local(each)
        for name, of in optimizer_state(training.optimizer).items()
        for key, each in of.items()
    }
    return {
        "taken": training.step,
        "skipped": skipped,
        "rates": used,
        "error": None if error is None else (str(error), error.finding),
        "tensors": weights | states,
    }


def _train_each(cases: list[Case]) -> list[dict[str, Any]]:
    return [_train(case) for case in cases]


def _assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def config(small_model: tuple[str, ...]) -> Config:
    return load_config(CONFIG, [*small_model, *SETTINGS, "run.dir=unused", "optimizer.learning_rate=0.05"])


def _with_optimizer(config: Config, name: str, exchange: str = "auto") -> Config:
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, name=name),
        sharding=dataclasses.replace(config.sharding, exchange=exchange),
    )


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("optimizer", "exchange", "step", "where"),
    [
        ("sgd", "after", 1, "label"),
        ("adagrad", "reduce_scatter", 4, "feature"),
        ("adam", "unique_rows", 1, "feature"),
        ("adam", "unique_rows", 4, "label"),
        ("rowwise_adagrad", "unique_rows", STEPS, "label"),
    ],
)
def test_skipping_a_batch_is_bitwise_identical_to_a_run_without_it(
    ranks: Ranks, config: Config, optimizer: str, exchange: str, step: int, where: str
) -> None:
    config = _with_optimizer(config, optimizer, exchange)
    cases = [Case(config, pipelined, "skip", step, where) for pipelined in (False, True)]
    cases.append(Case(config, pipelined=False, step=step, where="nowhere", left_out=(step,)))
    both = ranks(2).run(_train_each, cases)
    for plain, pipelined, expected in both:
        for found in (plain, pipelined):
            assert found["error"] is None
            assert found["taken"] == STEPS
            assert found["skipped"] == [Finding(step, "loss", rank=1)]
            assert found["rates"] == expected["rates"]
            _assert_same_bits(found["tensors"], expected["tensors"])
        assert expected["taken"] == STEPS - 1


@pytest.mark.multirank
def test_a_non_finite_value_stops_both_loops_on_every_rank_after_the_same_step(ranks: Ranks, config: Config) -> None:
    found = [("label", 4), ("feature", 1), ("gradient", 4), ("gradient", STEPS), ("label", STEPS)]
    cases = [
        Case(config, pipelined, policy, step, where)
        for (where, step), policy, pipelined in pairwise(found, ("stop", "rollback"), (False, True))
    ]
    every = ranks(2).run(_train_each, cases)
    for case, *outcomes in zip(cases, *every, strict=True):
        expected = Finding(case.step, "loss", 1)
        if case.where == "gradient":
            # Under `stop` a gradient is looked at where training is settled; before, it is seen in the next loss.
            late = case.policy == "stop" and case.step < STEPS
            expected = Finding(case.step + 1, "loss", 1) if late else Finding(case.step, "gradient")
        for each in outcomes:
            assert not each["skipped"]
            text, finding = each["error"]
            assert finding == expected
            assert text.startswith(f"the training {expected.what} of step {expected.step} is not finite")
            assert "optimizer.learning_rate" in text
            # It is raised in place of a later step's outcome, so that nobody waits for it; the last, when settled.
            known = expected.step + (expected.what == "gradient")
            assert each["taken"] == min(known, STEPS)


@pytest.mark.multirank
def test_a_gradient_that_is_not_finite_is_not_skipped(ranks: Ranks, config: Config) -> None:
    cases = [Case(config, pipelined, "skip", 3, "gradient") for pipelined in (False, True)]
    for outcomes in ranks(2).run(_train_each, cases):
        for each in outcomes:
            assert each["error"][1] == Finding(3, "gradient")
            assert not each["skipped"]


@pytest.mark.multirank
def test_rolling_back_is_bitwise_identical_to_a_run_without_the_batch(ranks: Ranks, config: Config) -> None:
    config = _with_optimizer(config, "adam")
    again = [Case(config, pipelined, "rollback", 5, "label", passed_over=(5,)) for pipelined in (False, True)]
    expected = Case(config, pipelined=False, step=5, where="nowhere", left_out=(5,))
    for *both, never in ranks(2).run(_train_each, [*again, expected]):
        for found in both:
            assert found["error"] is None
            assert found["skipped"] == [Finding(5, "earlier")]
            _assert_same_bits(found["tensors"], never["tensors"])


@pytest.mark.multirank
def test_skipping_and_rolling_back_end_in_the_same_weights_and_are_counted(
    ranks: Ranks, data_that_overflows: Path, small_model: tuple[str, ...], tmp_path: Path
) -> None:
    results = {}
    for policy in ("skip", "rollback"):
        run = tmp_path / policy
        settings = (*small_model[1:], f"data.path={data_that_overflows}", "train.max_steps=16", "train.log_every=4")
        settings += ("train.checkpoint_every=6", "train.keep_last=9", f"train.on_non_finite={policy}")
        result = results[policy] = train_in_ranks(ranks, 2, *settings, "optimizer.name=adagrad", f"run.dir={run}")
        found = records(run)
        (skipped,) = (record for record in found if record["split"] == "skipped")
        assert skipped["step"] == 11
        assert skipped["skipped_batches"] == result["skipped_batches"] == 1
        assert skipped.get("rank") == (1 if policy == "skip" else None)
        back = [record for record in found if record["split"] == "rollback"]
        assert [(each["step"], each["batch_of_step"]) for each in back] == ([(6, 11)] if policy == "rollback" else [])
        assert result["rollbacks"] == len(back)
        assert [record["step"] for record in found if record["split"] == "train"] == [4, 8, 12, 16]
        # Killed after the batch was excluded, or after a rollback while the steps since 6 were repeated.
        for step in (6, 12) if policy == "rollback" else (12,):
            killed = stopped_after(step, run, tmp_path / f"{policy} killed after {step}")
            again = train_in_ranks(ranks, 2, *settings, "optimizer.name=adagrad", f"run.dir={killed}")
            assert again["first_step"] == step
            assert (again["rollbacks"], again["skipped_batches"]) == (len(back), 1)
            assert again["weights_sha256"] == result["weights_sha256"]
            assert records(killed) == found
    assert results["skip"]["weights_sha256"] == results["rollback"]["weights_sha256"]


@pytest.mark.e2e
def test_a_run_that_stops_reports_the_reason_in_one_line(
    data_that_overflows: Path, small_model: tuple[str, ...], tmp_path: Path
) -> None:
    settings = (*small_model[1:], f"data.path={data_that_overflows}", "train.max_steps=16", "train.checkpoint_every=11")
    done = mlet(
        "train", CONFIG, *settings, "optimizer.name=adagrad", f"run.dir={tmp_path / 'run'}", "--nproc", 2, expect=2
    )
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mlet: error: "))
    assert line.startswith("mlet: error: the training loss of step 11 is not finite on rank 1; ")
    last = records(tmp_path / "run")[-1]
    assert (last["split"], last["batch_of_step"]) == ("diverged", 11)
    assert "optimizer.learning_rate" in line
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.multirank
def test_more_skipped_batches_than_the_limit_stop_the_run(ranks: Ranks, config: Config) -> None:
    cases = [
        Case(config, pipelined, "skip", 2, "label", limit=limit) for pipelined in (False, True) for limit in (0, 1)
    ]
    for outcomes in ranks(2).run(_train_each, cases):
        for case, each in zip(cases, outcomes, strict=True):
            assert (each["error"] is None) == (case.limit == 1)
            if case.limit == 0:
                assert each["error"][1] == Finding(2, "loss", 1)
                assert "0 batches" in each["error"][0]
