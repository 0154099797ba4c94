"""Exports a trained run in several outputs, and keeps the predictions of each for the rows of the data set's splits."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.atomic_directory import staged_directory
from mlet_dist.config.config_file import Config
from mlet_dist.errors import UserError, writing
from mlet_dist.formatting import load_json, to_json
from mlet_dist.sweep.logged_commands import LoggedCommands
from mlet_dist.sweep.shared_directory import exclusive
from mlet_dist.sweep.trained_points import Outcome

OUTPUTS_FILE = "outputs.json"
_FORMS = {"none": "", "static": "-mixed", "adaptive": "-kept"}


@dataclass(frozen=True)
class Scored:
    """What is known of the outputs of a run.

    Attributes:
        path: a directory with a Parquet file of scores for each split and output, as ``test/int8.parquet``.
        outputs: by output, ``served_bytes``, and by split what `mlet verify` says of it.
    """

    path: Path
    outputs: Mapping[str, Mapping[str, Any]]


def outputs_of(config: Config, encodings: Sequence[str]) -> list[str]:
    """Return the outputs of a run: of a compressed one the variant that holds narrow or stored rows alone.

    Sequences have no quantised tables.
    """
    if config.model.sequences:
        encodings = [name for name in encodings if name == "dcp"]
    return [name + _FORMS[config.compression.policy] for name in encodings]


def quantised_of(outputs: Sequence[str]) -> list[str]:
    """Return the outputs with quantised tables, which `mlet verify` compares by their AUC."""
    return [name for name in outputs if name.partition("-")[0] != "dcp"]


class ScoredPoints:
    """Scores finished runs, in directories beside them, unless they are scored already.

    Args:
        commands: runs `mlet export` and `mlet verify`.
        splits: of the data set.
    """

    def __init__(self, commands: LoggedCommands, splits: Sequence[str]) -> None:
        self._commands, self._splits = commands, splits

    def score(self, outcome: Outcome, config: Config, outputs: Sequence[str]) -> Scored:
        """Score a run that has ended, or return what an earlier time found.

        Raises:
            UserError: a command failed; its log says why. Or a float32 output does not predict what the run does.
            Interrupted: the sweep was stopped.
        """
        run = outcome.run
        path = run.with_name(f"{run.name}-scores")
        with exclusive(run.with_name(f".{run.name}-scores.lock"), self._commands.wait):
            found = _load(path)
            if found is None or not set(outputs) <= set(found):
                # Those that another sweep with the same runs wants stay.
                others = [name for name in found or {} if name not in outputs]
                found = self._score(run, config, [*outputs, *others], path)
            shutil.rmtree(_export_of(run), ignore_errors=True)  # also that of a sweep that was killed here
        return Scored(path, {name: found[name] for name in outputs})

    def _score(self, run: Path, config: Config, outputs: Sequence[str], path: Path) -> dict[str, Any]:
        log, export = run.with_suffix(".log"), _export_of(run)
        with writing(path):
            for old in (path, export):
                shutil.rmtree(old, ignore_errors=True)
            exported = self._commands.result(
                "export", str(run), "--out", str(export), "--preprocessing", "none", "--outputs", *outputs, log=log
            )
        found: dict[str, Any] = {name: {"served_bytes": size} for name, size in exported["served_bytes"].items()}
        with staged_directory(path) as staged:
            for split in self._splits:
                verified = self._commands.result(
                    *("verify", str(export), "--run", str(run), "--data", config.data.path, "--split", split),
                    *("--scores", str(staged / split)),
                    log=log,
                )
                for name, each in verified["outputs"].items():
                    if each["encoding"] == "fp32" and not each["ok"]:
                        raise UserError(f"{export}: {name} does not predict what {run} does; see {log}")
                    kept = {key: value for key, value in each.items() if key not in ("tables", "tolerance")}
                    found[name][split] = kept
            (staged / OUTPUTS_FILE).write_text(to_json(found, indent=1) + "\n", encoding="utf-8")
        return found


def _export_of(run: Path) -> Path:
    return run.with_name(f"{run.name}-export")


def _load(path: Path) -> dict[str, Any] | None:
    """Return what was found of a run's outputs, or None if it is not scored."""
    try:
        found: dict[str, Any] = load_json(path / OUTPUTS_FILE)
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{path / OUTPUTS_FILE}: cannot be read; remove {path}, and the run is scored again") from None
