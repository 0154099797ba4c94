from collections.abc import Callable

import pytest
import torch
from torchrec.models.dlrm import DenseArch

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.training.dense_arch_check import DenseArchCheck
from mlet_dist.training.state import Training
from tests.helpers.mlet_command import ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.small_run import loader, training_of

Ranks = Callable[[int], RankPool]
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def _check(config: Config, dead: str, constant_on: tuple[int, ...]) -> list[tuple[str | None, bool | None]]:
    """Return the results of two checks of an untrained model, of which a layer's ReLU may be 0 for all rows."""
    training, _ = training_of(config, steps=1)
    training.step = 7
    (dense_arch,) = (module for module in training.model.modules() if isinstance(module, DenseArch))
    with torch.no_grad():
        for name, parameter in dense_arch.named_parameters():
            if dead and f".{dead}." in name:
                parameter.fill_(-1.0 if name.endswith("bias") else 0.0)
    training.batch = next(iter(loader(config)))
    if torch.distributed.get_rank() in constant_on:
        training.batch.dense[:] = training.batch.dense[0]
    if constant_on == (0, 1):
        training.batch.dense[:] = 0.25
    check = DenseArchCheck(training)
    check.note(training)
    return [(check(), check.varies) for _ in range(2)]


@pytest.fixture
def config(small_model: tuple[str, ...]) -> Config:
    return load_config(CONFIG, [*small_model, "model.bottom_mlp=[16, 8]", "run.dir=unused"])


@pytest.mark.multirank
@pytest.mark.parametrize("layer", ["0", "1", "2"])
def test_a_dead_layer_is_noticed_on_all_ranks_and_said_once(ranks: Ranks, config: Config, layer: str) -> None:
    for first, second in ranks(2).run(_check, config, layer, ()):
        assert first[1] is False
        assert first[0] is not None
        assert "the output of the dense arch is the same for all 64 rows of step 7" in first[0]
        assert "optimizer.warmup_steps" in first[0]
        assert second == (None, False)


@pytest.mark.multirank
@pytest.mark.parametrize("constant_on", [(), (0,), (1,)])
def test_an_output_that_varies_on_any_rank_is_well(ranks: Ranks, config: Config, constant_on: tuple[int, ...]) -> None:
    assert ranks(2).run(_check, config, "", constant_on) == [[(None, True)] * 2] * 2


@pytest.mark.multirank
def test_dense_columns_that_do_not_vary_tell_nothing(ranks: Ranks, config: Config) -> None:
    assert ranks(2).run(_check, config, "1", (0, 1)) == [[(None, None)] * 2] * 2


def _check_without_batch(config: Config) -> tuple[str | None, bool | None]:
    training, _ = training_of(config, steps=1)
    check = DenseArchCheck(training)
    check.note(training)
    return check(), check.varies


@pytest.mark.multirank
def test_nothing_is_known_before_the_first_step(ranks: Ranks, config: Config) -> None:
    assert ranks(1).run(_check_without_batch, config) == [(None, None)]


def _make_negative_rows_inactive(training: Training) -> None:
    """Give the dense arch weights with which its output is 0 for rows of negative numbers alone."""
    (dense_arch,) = (module for module in training.model.modules() if isinstance(module, DenseArch))
    with torch.no_grad():
        for name, parameter in dense_arch.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.abs_()


def _check_after_an_incomplete_batch(config: Config) -> tuple[str | None, bool | None]:
    """Return the result of a check where the output is constant over the rows of the incomplete last batch alone."""
    training, _ = training_of(config, steps=2)
    _make_negative_rows_inactive(training)
    check = DenseArchCheck(training)
    for training.step, training.batch in enumerate(loader(config), start=1):
        incomplete = training.batch.global_rows < config.data.batch_size
        training.batch.dense.abs_().mul_(-1 if incomplete else 1)
        check.note(training)
    assert incomplete
    return check(), check.varies


@pytest.mark.multirank
def test_the_rows_of_an_incomplete_batch_tell_nothing(ranks: Ranks, small_model: tuple[str, ...]) -> None:
    config = load_config(CONFIG, [*small_model, "data.batch_size=62", "run.dir=unused"])
    assert ranks(2).run(_check_after_an_incomplete_batch, config) == [(None, True)] * 2


def _check_of_rows_of_which_few_are_active(config: Config) -> list[tuple[str | None, bool | None]]:
    """Return the results of checks of a model that is well, whose last batch has no row with an output above 0."""
    training, _ = training_of(config, steps=2)
    _make_negative_rows_inactive(training)
    check, found = DenseArchCheck(training), []
    for training.step, training.batch in zip((1, 2, 3), loader(config), strict=False):
        training.batch.dense.abs_().mul_(-1)
        if training.step == 2:
            training.batch.dense[0].abs_()
        check.note(training)
        found.append((check(), check.varies))
    return found


@pytest.mark.multirank
def test_a_model_is_not_called_dead_by_the_few_rows_of_one_batch(ranks: Ranks, small_model: tuple[str, ...]) -> None:
    config = load_config(CONFIG, [*small_model, "data.batch_size=4", "run.dir=unused"])
    ((first, *others),) = ranks(1).run(_check_of_rows_of_which_few_are_active, config)
    assert first[1] is False
    assert "the same for all 4 rows of step 1, so" in str(first[0])
    assert others == [(None, True)] * 2
