"""Runs of made-up quality, with their scores on disk, for tests of reports."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.config.config_file import load_config
from mlet_dist.quality.score_metrics import Scores, auc, logloss
from mlet_dist.report.measured_runs import MeasuredRun
from tests.helpers.mlet_command import ROOT

ROWS = 4000
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


class MadeUpArms:
    """Arms whose logits are the true ones with noise: the more, the worse they are.

    Args:
        path: directory for the scores.
        seed: of the rows and of the noise.
    """

    def __init__(self, path: Path, seed: int = 0, rows: int = ROWS) -> None:
        self._path, self._generator, self._rows = path, np.random.default_rng(seed), rows
        self._truth = {split: self._generator.normal(-1, 1.2, rows) for split in ("valid", "test")}
        self._labels = {
            split: self._generator.random(rows) < 1 / (1 + np.exp(-truth)) for split, truth in self._truth.items()
        }
        # What all models get wrong in the same way, so that they differ by less than each differs from the truth.
        self._shared = {split: 0.8 * self._generator.normal(size=rows) for split in self._truth}

    def arm(
        self,
        name: str,
        kind: str,
        noise: float | dict[str, float],
        sizes: dict[str, int],
        seeds: Sequence[int] = (0, 1, 2),
        training_bytes: int = 2000,
        control_of: str | None = None,
    ) -> list[MeasuredRun]:
        """Return the runs of an arm; ``noise`` may differ by split, and ``sizes`` are those of its outputs."""
        settings = {"mlet": "8", "single": "null", "control": "null", "single_compressed": "null"}
        runs = []
        for seed in seeds:
            config = load_config(
                CONFIG, [f"model.hidden_dim={settings[kind]}", f"train.seed={seed}", "run.dir=x", "data.path=none"]
            )
            scores = self._path / f"{name}-{seed}"
            outputs: dict[str, dict[str, object]] = {output: {"served_bytes": size} for output, size in sizes.items()}
            for split, truth in self._truth.items():
                amount = noise if isinstance(noise, float) else noise[split]
                own = amount * self._generator.normal(size=self._rows)
                for output in sizes:
                    logits = (truth + self._shared[split] + own).astype(np.float32)
                    own = own + 0.01 * self._generator.normal(size=self._rows)  # of rounding
                    found = Scores.of(logits, self._labels[split])
                    outputs[output][split] = {"auc": auc(found), "logloss": logloss(found)}
                    (scores / split).mkdir(parents=True, exist_ok=True)
                    columns = {
                        "row": np.arange(self._rows),
                        "label": self._labels[split].astype(np.float32),
                        "logit": logits,
                    }
                    pq.write_table(pa.table(columns), scores / split / f"{output}.parquet")
            summary = {"training_bytes_peak": training_bytes}
            tuned = {"optimizer.learning_rate": 0.02}
            run = MeasuredRun(name, kind, config, tuned, summary, scores, None, outputs, scores, control_of)
            runs.append(run)
        return runs
