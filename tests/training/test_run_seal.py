"""The seals of a run's files: what they find, and what may still be edited and copied."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlet_dist.config.config_file import load_config
from mlet_dist.errors import UserError
from mlet_dist.training.resume import checkpoint_at
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.run_seal import (
    check_one_run,
    load_sealed_json,
    new_run_id,
    run_id_of_yaml,
    sealed_json,
    sealed_yaml,
)
from tests.conftest import TrainedRun
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
FILES = ("config.yaml", "model.json", "plan.json", "summary.json")
RUN_ID = "0123456789abcdef" * 2


def test_any_changed_byte_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    text, content = tmp_path / "config.yaml", tmp_path / "model.json"
    text.write_text(sealed_yaml("a: 1\nb: [x]\n", text.name, RUN_ID))
    content.write_text(json.dumps(sealed_json({"a": 1.5, "b": [None, "x"]}, content.name, RUN_ID)))
    assert run_id_of_yaml(text) == RUN_ID
    assert load_sealed_json(content) == ({"a": 1.5, "b": [None, "x"]}, RUN_ID)
    for path, read in ((text, run_id_of_yaml), (content, load_sealed_json)):
        whole = path.read_bytes()
        expected = read(path)
        for position in range(len(whole)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            try:
                found = read(path)
            except UserError:
                continue
            # A seal that is no seal any more reads as none, which no other file of the run has.
            run_id = found[1] if isinstance(found, tuple) else found
            assert run_id is None or found == expected, (path, position)


def test_a_file_cannot_take_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(sealed_json({"a": 1}, "model.json", RUN_ID)))
    with pytest.raises(UserError, match=r"summary\.json: was changed after the run wrote it"):
        load_sealed_json(path)


def test_files_of_different_runs_are_named(tmp_path: Path) -> None:
    assert check_one_run(tmp_path, [("a", RUN_ID), ("b", RUN_ID)]) == RUN_ID
    assert check_one_run(tmp_path, [("a", None), ("b", None)]) is None
    other = new_run_id()
    with pytest.raises(UserError) as caught:
        check_one_run(tmp_path, [("a", RUN_ID), ("b", other), ("c", None), ("d", other)])
    assert str(caught.value) == (
        f"{tmp_path}: its files were not written by one run: a of run 01234567; b and d of run {other[:8]}; c without "
        "a seal; put the run's own files back"
    )


@pytest.fixture(scope="module")
def other(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another seed, so that all its files would pass for the first run's."""
    run = tmp_path_factory.mktemp("other") / "run"
    mlet_json("train", CONFIG, *trained.overrides, "train.seed=5", f"run.dir={run}")
    return run


@pytest.fixture
def run(trained: TrainedRun, tmp_path: Path) -> Path:
    """A copy of the first run."""
    return Path(shutil.copytree(trained.path, tmp_path / "copy"))


def readers(run: Path, trained: TrainedRun, out: Path) -> dict[str, tuple[object, ...]]:
    return {
        "export": ("export", run, "--out", out),
        "spectrum": ("spectrum", run),
        "evaluate": ("evaluate", run, "--data", trained.data),
        "verify": ("verify", out, "--run", run, "--data", trained.data),
        "factorize": ("factorize", run, "--out", out, "--hidden-dim", 8),
        "train --once": ("train", CONFIG, *trained.overrides, f"run.dir={run}", "--once"),
    }


@pytest.mark.e2e
@pytest.mark.parametrize("name", FILES)
def test_an_exchanged_file_is_refused_and_named(name: str, run: Path, other: Path) -> None:
    RunDirectory(run).load()
    shutil.copy(other / name, run / name)
    with pytest.raises(UserError) as caught:
        RunDirectory(run).load()
    assert str(caught.value).startswith(f"{run}: its files were not written by one run: ")
    assert name in str(caught.value)


CHANGES: dict[str, tuple[str, Callable[[str], str]]] = {
    "a learning rate": ("config.yaml", lambda text: text.replace("learning_rate: 0.05", "learning_rate: 0.06")),
    "another place": ("config.yaml", lambda text: text.replace("checkpoint_dir: null", "checkpoint_dir: elsewhere")),
    "a comment": ("config.yaml", lambda text: f"# mine\n{text}"),
    "the order of features": ("model.json", lambda text: text.replace('"I1"', '"I"').replace('"I2"', '"I1"')),
    "a seed": ("model.json", lambda text: text.replace('"seed": 0', '"seed": 1')),
    "a metric": ("summary.json", lambda text: text.replace('"test_auc": 0.', '"test_auc": 0.9')),
    "a plan": ("plan.json", lambda text: text.replace('"world_size": 2', '"world_size": 4')),
}


@pytest.mark.e2e
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused_and_named(change: str, run: Path) -> None:
    name, edit = CHANGES[change]
    text = (run / name).read_text()
    assert edit(text) != text
    (run / name).write_text(edit(text))
    with pytest.raises(UserError) as caught:
        RunDirectory(run).load()
    assert str(caught.value).startswith(f"{run / name}: was changed after the run wrote it")


@pytest.mark.e2e
@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_truncated_config_is_named_as_such_and_not_as_one_to_complete(left: int, run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: left * len(text) // 3])
    with pytest.raises(UserError) as caught:
        RunDirectory(run).load()
    assert "its files were not written by one run: config.yaml without a seal" in str(caught.value)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["model.json", "plan.json", "summary.json"])
def test_a_start_from_a_run_checks_its_other_files_too(name: str, run: Path, other: Path) -> None:
    shutil.copy(other / name, run / name)
    for setting in ("train.resume", "train.initial_weights"):
        with pytest.raises(UserError, match=rf"were not written by one run: .*{name}"):
            checkpoint_at(str(run), setting)


@pytest.mark.e2e
def test_every_command_that_reads_a_run_checks_its_seals(run: Path, trained: TrainedRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mlet("export", run, "--out", out)
    summary = (run / "summary.json").read_text()
    (run / "summary.json").write_text(summary.replace('"steps": 57', '"steps": 58'))
    for arguments in readers(run, trained, out).values():
        assert "summary.json: was changed after the run wrote it" in error_line(*arguments), arguments
    (run / "summary.json").write_text(summary)
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 0", "seed: 9"))
    for setting in ("train.resume", "train.initial_weights"):
        line = error_line("train", CONFIG, *trained.overrides, f"run.dir={tmp_path / 'new'}", f"{setting}={run}")
        assert f"{run / 'config.yaml'}: was changed after the run wrote it" in line
    assert not (tmp_path / "new" / "config.yaml").exists()


@pytest.mark.e2e
def test_checkpoints_of_another_run_are_refused_and_named(run: Path, other: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    for arguments in (("export", run, "--out", tmp_path / "out"), ("spectrum", run)):
        line = error_line(*arguments)
        assert f"{run}: its files were not written by one run: config.yaml of run " in line
        assert f"{run / 'checkpoints' / 'step-00000057'} of run " in line


@pytest.mark.e2e
def test_what_people_may_edit_and_copy_still_works(run: Path, trained: TrainedRun, tmp_path: Path) -> None:
    """A config of a run as the input of another run; a run that is moved; a run that another version wrote."""
    edited = tmp_path / "edited.yaml"
    edited.write_text((run / "config.yaml").read_text().replace("max_steps: 57", "max_steps: 3"))
    assert mlet_json("train", edited, f"run.dir={tmp_path / 'new'}")["steps"] == 3
    (run / "config.yaml").chmod(0o644)
    assert load_config(edited).train.max_steps == 3
    moved = run.rename(tmp_path / "moved to")
    expected = mlet_json("export", moved, "--out", tmp_path / "out")
    assert not [key for key in expected if "seal" in key]
    (moved / "metrics.jsonl").write_text("")  # for people; no command reads it
    (moved / "notes.txt").write_text("mine")
    mlet("evaluate", moved, "--data", trained.data)


@pytest.mark.e2e
def test_a_run_without_seals_is_read_with_a_warning_unless_its_checkpoint_has_one(run: Path, tmp_path: Path) -> None:
    config, spec, summary = RunDirectory(run).load()
    unsealed = RunDirectory(run)  # as before there were seals
    with unsealed.lock(load_config(run / "config.yaml", ["run.overwrite=true"])):
        pass
    plan = json.loads((run / "plan.json").read_text())
    kept = Path(shutil.copytree(run / "checkpoints", tmp_path / "kept"))
    unsealed.prepare(config, spec, resumes=True)
    unsealed.save_plan(plan["tables"], plan["world_size"])
    unsealed.finish(summary)
    assert unsealed.load() == (config, spec, summary)
    line = error_line("export", run, "--out", tmp_path / "out")
    assert "its files were not written by one run: config.yaml without a seal; " in line
    manifest = kept / "step-00000057" / "manifest.json"
    content = json.loads(manifest.read_text())["content"]
    from mlet_dist.checkpoint.manifest import Manifest

    del content["about"]["run"]
    rewritten = Manifest(content["step"], content["files"], content["about"]).render()
    (run / "checkpoints" / "step-00000057" / "manifest.json").write_bytes(rewritten)
    done = mlet("export", run, "--out", tmp_path / "out")
    assert f"mlet: warning: {run}: a version of mlet_dist without seals wrote this run" in done.stderr


@pytest.mark.e2e
def test_a_resumed_run_keeps_its_id_and_a_new_one_has_another(trained: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("train", CONFIG, *trained.overrides, f"run.dir={run}", "train.checkpoint_every=20")
    ids = []
    for steps in (30, 45):
        mlet(*arguments, f"train.max_steps={steps}")
        ids.append(run_id_of_yaml(run / "config.yaml"))
        if steps == 30:
            os.unlink(run / "summary.json")
    assert ids[0] == ids[1]
    mlet(*arguments, "train.max_steps=3", "run.overwrite=true")
    assert run_id_of_yaml(run / "config.yaml") not in (None, ids[0])
