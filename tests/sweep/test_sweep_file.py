"""A sweep's file is read strictly, and what is wrong in it is named."""

from pathlib import Path

import pytest

from mlet_dist.errors import UserError
from mlet_dist.sweep.sweep_file import Interval, TuneConfig, load_sweep

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
        ("arms: {a: {model.hidden_dim: 8}}", "at the working directory); set it there or as config=…"),
        (
            "config: c.yaml\narms: {a: {run.dir: x}}",
            "arms.a.run.dir: each run of a sweep has its own; use --out or runs",
        ),
        (
            "config: c.yaml\npreset: paper\nsettings: {train.seed: 1}",
            "settings.train.seed: each run of a sweep has its",
        ),
        ('config: c.yaml\narms: {"a\\nb": {model.hidden_dim: 8}}', r'arms: "a\nb" is no name of an arm; use visible'),
        ('config: c.yaml\narms: {" ": {model.hidden_dim: 8}}', 'arms: " " is no name of an arm; use visible'),
        ("config: c.yaml\narms: {a: 3}", "arms.a: expected settings by name, found 3"),
        ("config: c.yaml\ngrid: {model.hidden_dim: 64}", "grid.model.hidden_dim: expected a list of values, found 64"),
        ("config: c.yaml\ngrid: {model.hidden_dim: []}", "grid.model.hidden_dim: expected a list of values, found []"),
        ("config: c.yaml\npreset: paper\nseeds: [1, 1]", "seeds is [1, 1]; name each seed once"),
        ("config: c.yaml\npreset: paper\noutputs: [dcp, dcp]", "outputs is [dcp, dcp]; name each output once"),
        ("config: c.yaml\npreset: papers", "preset: expected paper or null, found papers (did you mean 'paper'?)"),
        (
            "config: c.yaml\npreset: paper\ntune: {settings: {a.b: {low: 2, high: 1}}}",
            "tune.settings.a.b: low 2 is not below high 1",
        ),
        (
            "config: c.yaml\npreset: paper\ntune: {settings: {model.embedding_dim: {low: 4, high: 16}}}",
            "tune.settings.model.embedding_dim: only numbers with a fraction are tuned; try its values as arms, by "
            "grid: {model.embedding_dim: [VALUE, VALUE]}",
        ),
        (
            "config: c.yaml\npreset: paper\ntune: {settings: {optimizer.name: {low: 1, high: 2}}}",
            "tune.settings.optimizer.name: only numbers with a fraction are tuned",
        ),
        (
            "config: c.yaml\npreset: paper\ntune: {metric: logless}",
            "tune.metric: expected logloss, auc, or one of these of a label, as click_auc, found logless (did you mean "
            "'logloss'?)",
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


@pytest.mark.parametrize(
    "name",
    ["optimizer.learning_rate", "optimizer.rows_learning_rate", "compression.budget", "model.arguments.dropout", "a.b"],
)
def test_settings_that_may_have_a_fraction_can_be_tuned(name: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"config: c.yaml\npreset: paper\ntune: {{settings: {{{name}: {{low: 0.1, high: 1}}}}}}")
    assert list(load_sweep(path).tune.settings) == [name]


def test_keys_of_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "sweep.yaml"
    path.write_text(
        "config: c.yaml\nruns: shared\nsettings: {data.path: a, train.epochs: 1}\narms: {a: {model.hidden_dim: 8}}\n"
        "tune: {settings: {optimizer.rows_learning_rate: {low: 0.1, high: 1}}, steps: 9, first_steps: 3}\nworkers: 1\n"
    )
    typed = [
        "config=../d.yaml", "settings.data.path=exp #1: x", "settings.model.hidden_dim=null", "tune.steps=18",
        "tune.first_steps=null", "tune.settings.optimizer.rows_learning_rate.low=0.01",
        "workers=8", "seeds=[5, 6]", "outputs=[dcp]",
    ]  # fmt: skip
    sweep = load_sweep(path, typed)
    assert sweep.config == "../d.yaml"  # as it was typed: from the working directory
    assert sweep.runs == str(tmp_path / "here" / "shared")
    assert sweep.settings == {"data.path": "exp #1: x", "train.epochs": 1, "model.hidden_dim": "null"}
    assert (sweep.tune.steps, sweep.tune.first_steps) == (18, None)
    assert sweep.tune.settings == {"optimizer.rows_learning_rate": Interval(0.01, 1)}
    assert (sweep.workers, sweep.seeds, sweep.outputs) == (8, (5, 6), ("dcp",))
    assert load_sweep(path).workers == 1


@pytest.mark.parametrize("settings", ["", "settings: null\n", "settings: {data.path: a}\n"])
def test_settings_may_be_on_the_command_line_alone(settings: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"{settings}preset: paper\n")
    sweep = load_sweep(path, ["config=c.yaml", "settings.data.path=b"])
    assert (sweep.config, sweep.settings) == ("c.yaml", {"data.path": "b"})


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("workres=8", "'workres=8': an override is written section.key=value"),
        ("workers", "'workers': an override is written section.key=value"),
        ("tune=", "tune="),
        ("workers=many", "workers: expected a whole number, found many"),
        ("workers=0", "workers is 0, it must be at least 1"),
        ("tune.step=5", "tune.step: unknown key (did you mean 'steps'?)"),
        ("settings=3", "settings: expected values by name, found 3"),
        ("outputs=[int3]", "outputs: expected a list, each one of dcp, fp16, int8, int4, found"),
    ],
)
def test_a_wrong_key_of_the_command_line_is_named(typed: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("config: c.yaml\npreset: paper")
    with pytest.raises(UserError) as error:
        load_sweep(path, [typed])
    assert str(error.value).startswith("command line: ")
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
