"""A sweep's file is read strictly, and what is wrong in it is named."""

from pathlib import Path

import pytest

from mlet_dist.errors import UserError
from mlet_dist.sweep.sweep_file import TuneConfig, load_sweep

SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_of_the_repository_can_be_read(path: Path) -> None:
    sweep = load_sweep(path)
    assert Path(sweep.config).exists()
    assert sweep.tune.settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config: c.yaml", "names no arms; set arms, grid or preset"),
        ("config: c.yaml\nsedes: [1]", "sedes: unknown key (did you mean 'seeds'?)"),
        ("arms: {a: {model.hidden_dim: 8}}", "config is missing"),
        ("config: c.yaml\narms: {a: 3}", "arms.a: expected settings by name, found 3"),
        ("config: c.yaml\ngrid: {model.hidden_dim: 64}", "grid.model.hidden_dim: expected a list of values, found 64"),
        ("config: c.yaml\ngrid: {model.hidden_dim: []}", "grid.model.hidden_dim: expected a list of values, found []"),
        ("config: c.yaml\npreset: paper\nseeds: [1, 1]", "seeds is [1, 1]; name each seed once"),
        ("config: c.yaml\npreset: papers", "preset: expected paper or null, found papers (did you mean 'paper'?)"),
        (
            "config: c.yaml\npreset: paper\ntune: {settings: {a.b: {low: 2, high: 1}}}",
            "tune.settings.a.b: low 2 is not below high 1",
        ),
        ("config: c.yaml\npreset: paper\ntune: {steps: 5, first_steps: 6}", "tune.first_steps 6 is above tune.steps 5"),
        (
            "config: c.yaml\npreset: paper\ntune: {settings: {a.b: {low: 0, high: 1}}}",
            "low is 0, it must be a finite",
        ),
    ],
)
def test_what_is_wrong_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_sweep(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_paths_begin_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("config: c.yaml\nruns: shared\npreset: paper")
    sweep = load_sweep(path)
    assert (sweep.config, sweep.runs) == (str(tmp_path / "c.yaml"), str(tmp_path / "shared"))


@pytest.mark.parametrize(
    ("steps", "first", "expected"),
    [(100, None, [100]), (100, 100, [100]), (100, 10, [10, 30, 90, 100]), (90, 10, [10, 30, 90])],
)
def test_trials_are_compared_at_powers_of_keep(steps: int, first: int | None, expected: list[int]) -> None:
    assert TuneConfig(steps=steps, first_steps=first).compared_at == expected
