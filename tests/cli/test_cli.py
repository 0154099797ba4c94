import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlet_dist import __version__
from mlet_dist.cli import main
from mlet_dist.cli.main import parse
from mlet_dist.cli.options import load_checked_config, without_launch_options
from mlet_dist.cli.output import print_result
from mlet_dist.data.preprocessing import Preprocessing
from mlet_dist.data.schema import DatasetSchema, Part, SparseFeature
from tests.helpers.mlet_command import ROOT, error_line

COMMANDS = ["describe", "prepare", "synth", "train", "compare", "plan", "evaluate", "export", "verify", "doctor"]
# Runs the command and prints as the last line its exit code and whether torch was imported.
WATCHED = """
import sys
from mlet_dist.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
print(code, "torch" in sys.modules)
"""


def watch_imports(*arguments: object) -> tuple[list[str], list[str]]:
    """Return the lines of stdout, the last of which is the exit code and whether torch was imported, and of stderr."""
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config whose data set has a schema but no rows, which is enough for all checks before training."""
    parts = {split: (Part(f"{split}/0.parquet", 10, 5, 99, *2 * (64 * "0",)),) for split in ("train", "valid", "test")}
    data = tmp_path / "data"
    data.mkdir()
    made = Preprocessing({"column": "label"}, {"I1": {"transform": "log1p"}}, {"C1": {"encoding": "vocabulary"}})
    DatasetSchema("synthetic", "label", ("I1",), (SparseFeature("C1", 9),), 0, parts, made).save(data)
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{path: {data}, batch_size: 8}}\nrun: {{dir: {tmp_path / 'run'}}}\n")
    return path


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    out, err = watch_imports(*arguments)
    assert out[0].startswith(f"usage: mlet {arguments[0] if len(arguments) == 2 else ''}".rstrip())
    assert out[-1] == "0 False"
    assert err == []


def test_help_lists_every_command_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")}
    assert listed >= set(COMMANDS)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert (
        "  model.hidden_dim (default 64)\n        k: the number of columns of W1 in training" in capsys.readouterr().out
    )


ERRORS = {
    "typo": (["model.hiden_dim=8"], "command line: model.hiden_dim: unknown key (did you mean 'hidden_dim'?)"),
    "type": (["model.hidden_dim=x"], "command line: model.hidden_dim: expected a whole number or null, found x"),
    "no data": (["data.path=/no/such"], "/no/such: no such data set; run `mlet prepare` to make one"),
    "feature": (["data.sparse_features=[C2]"], "data.sparse_features: "),
    "ranks": (["--nproc", "3"], "data.batch_size 8 is not a multiple of the 3 ranks; use 6 or 9"),
    "nproc": (["--nproc", "two"], "argument --nproc: 'two' is not a whole number of at least 1"),
    "option": (["--nprc", "2"], "unknown argument '--nprc' (see `mlet "),
    "no abbreviation": (["--npr", "2"], "unknown argument '--npr' (see `mlet "),
    "no override": (["--json", "hidden_dim"], "unknown argument 'hidden_dim' (see `mlet "),
}


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_found_before_torch_is_imported(command: str, error: str, config: Path) -> None:
    arguments, message = ERRORS[error]
    out, err = watch_imports(command, config, *arguments)
    assert out == ["2 False"]
    assert len(err) == 1
    assert err[0].startswith(f"mlet: error: {message}")


def test_a_typo_in_the_file_is_found_before_torch_is_imported(config: Path) -> None:
    config.write_text(config.read_text() + "model: {hiden_dim: 8}\n")
    out, (line,) = watch_imports("train", config)
    assert out == ["2 False"]
    assert line.startswith(f"mlet: error: {config}: model.hiden_dim: unknown key (did you mean 'hidden_dim'?)")


def test_an_error_in_a_sweep_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    out, (line,) = watch_imports("sweep", "configs/sweeps/criteo.yaml", "arms=3", "--out", tmp_path / "out")
    assert out == ["2 False"]
    assert line.startswith("mlet: error: command line: arms: ")


def test_a_run_that_would_be_destroyed_is_found_before_torch_is_imported(config: Path) -> None:
    run = config.parent / "run"
    run.mkdir()
    (run / "holiday.jpg").touch()
    out, (line,) = watch_imports("train", config, "--nproc", 2)
    assert out == ["2 False"]
    assert line.startswith(f"mlet: error: run.dir {run} holds files that are not a run's")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "argument COMMAND: invalid choice: 'tarin'"),
        (["train"], "the following arguments are required: CONFIG (see `mlet train --help`)"),
        (["train", "no\nsuch.yaml"], "no such.yaml: cannot read the config: No such file or directory"),
        (["export", "no/such", "--out", "x"], "no/such: no such directory; expected a run or the output of"),
        (["evaluate", "x", "--data", "y", "a.b=1"], "unknown argument 'a.b=1' (see `mlet evaluate --help`)"),
    ],
    ids=["command", "no config", "two lines", "torch", "no overrides here"],
)
def test_an_error_is_one_line_on_stderr(arguments: list[str], message: str) -> None:
    line = error_line(*arguments)
    assert line.startswith(f"mlet: error: {message}")
    assert line.count("--help") <= 1


def test_no_command_at_all_is_an_error() -> None:
    assert error_line() == "mlet: error: the following arguments are required: COMMAND (see `mlet --help`)"


@pytest.mark.parametrize(
    "options", [["--nproc", "2"], ["--nproc=2"], ["--json"], ["--json", "--nproc", "2"]], ids=" ".join
)
@pytest.mark.parametrize("before", [0, 1, 2])
def test_overrides_stand_before_and_after_options(options: list[str], before: int, config: Path) -> None:
    overrides = ["model.hidden_dim=4", "model.hidden_dim=nine"]
    for arguments in (
        ["train", str(config), *overrides[:before], *options, *overrides[before:]],
        ["train", *options, str(config), *overrides],
    ):
        args = parse(arguments)
        assert args.overrides == overrides
        assert args.config == str(config)
        assert (args.nproc, args.json) == (2 if "nproc" in "".join(options) else None, "--json" in options)


def test_a_wrong_override_after_an_option_ends_the_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "model.hidden_dim=4", "--json", "model.hidden_dim=nine"]) == 2
    assert "found nine" in capsys.readouterr().err


def test_every_nproc_is_removed_from_the_command_of_the_ranks() -> None:
    given = ["train", "--nproc", "3", "c.yaml", "--nproc=4", "a.b=1", "--json", "--nproc", "2", "a.c=2"]
    assert parse(given).nproc == 2
    assert without_launch_options(given) == ["train", "c.yaml", "a.b=1", "--json", "a.c=2"]


def test_a_warning_is_one_line_and_does_not_stop_the_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = load_checked_config(parse(["train", str(config), "model.hidden_dim=8"]))
    assert checked.model.hidden_dim == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mlet: warning: model.hidden_dim 8 is below model.embedding_dim 16")


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a number"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is '', not a number"),
    ],
    ids=["missing", "not a number", "empty"],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_incomplete_environment_of_a_rank_is_an_error(
    command: str,
    variables: dict[str, str],
    found: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([command, str(config), *(["--data", "x"] if command == "evaluate" else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert found in line


def test_kubeflows_rank_does_not_silence_a_command_that_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["synth", "--out", str(tmp_path / "data"), "--rows", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


@pytest.mark.parametrize("redirect", ["| true", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("json_flag", ["", "--json"])
def test_closed_streams_do_not_fail_a_command(redirect: str, json_flag: str, tmp_path: Path) -> None:
    out = tmp_path / "data"
    # The reader is gone before the first line is written.
    shell = f"set -o pipefail; {{ sleep 0.5; {sys.executable} -m mlet_dist synth --out {out} --rows 20 {json_flag}; }}"
    done = subprocess.run(["bash", "-c", f"{shell} {redirect}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.exists()
    assert all(line.startswith("synthesize ") for line in done.stderr.splitlines()), done.stderr
    assert redirect != "2>&-" or done.stdout.startswith("{" if json_flag else "rows  ")


def test_nan_and_infinity_become_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arms = [{"auc": math.nan, "rows": 3}, {"auc": 0.5, "loss": -math.inf}]
    print_result({"ok": True, "auc": math.nan, "path": "NaN", "arms": arms}, as_json=True)
    shown = capsys.readouterr().out
    assert json.loads(shown, parse_constant=pytest.fail) == {
        "ok": True,
        "auc": None,
        "path": "NaN",
        "arms": [{"auc": None, "rows": 3}, {"auc": 0.5, "loss": None}],
    }
    assert shown.count("\n") == 1


def test_results_without_json_are_aligned_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_result({"rows": {"train": 12345}, "positive_rate": 0.25, "ok": True}, as_json=False)
    assert capsys.readouterr().out == "rows.train     12,345\npositive_rate  0.25\nok             True\n"


def test_all_entry_points_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("mlet")
    code = "import sys; from mlet_dist.cli import main; sys.argv[0] = 'mlet'; sys.exit(main())"
    entries = [[sys.executable, "-m", "mlet_dist"], [sys.executable, "-c", code]]
    entries += [[str(script)]] if os.access(script, os.X_OK) else []
    for arguments, expected in ((["--version"], 0), (["train", "--help"], 0), (["nonsense"], 2)):
        results = {
            (done.returncode, done.stdout, done.stderr)
            for entry in entries
            for done in [subprocess.run([*entry, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)]
        }
        ((returncode, stdout, _),) = results
        assert returncode == expected
        assert arguments != ["--version"] or stdout == f"mlet-dist {__version__}\n"


def test_doctor_needs_no_config_and_a_setting_is_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["doctor"]).config is None
    for command in ("train", "doctor"):
        assert main([command, "data.path=logs"]) == 2
        assert "no CONFIG is given: 'data.path=logs' is a setting" in capsys.readouterr().err
