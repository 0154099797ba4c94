"""The result of a comparison as a Markdown table, which is readable on a terminal, and what it means."""

import math
import re
from collections.abc import Mapping
from typing import Any

from mlet_dist.formatting import megabytes_text, signed
from mlet_dist.quality.paired_bootstrap import CONFIDENCE, Difference
from mlet_dist.training.summary_faults import dense_arch_fault

SINGLE, SINGLE_COMPRESSED, MLET, CONTROL = "single", "single_compressed", "mlet", "control"
_TITLES = {
    SINGLE: "single layer",
    SINGLE_COMPRESSED: "single layer, compressed",
    MLET: "MLET",
    CONTROL: "control: single layer, MLET's rate",
}
_CAPTION = """\
What the table means: the MLET row serves tables of the same size as the single layer's. Compare it with the control, a
single layer with MLET's effective learning rate and initial scale: what MLET gains over the control is due to the
factorisation.
"""
_COMPRESSED_CAPTION = """\
What the table means: tables in training are rows, W2 and the optimizer's state, over all ranks, and the share is that
of the single layer's, which is not compressed. Both compressed models have the same budget. There is no control,
because no single learning rate makes a single layer learn as compressed MLET tables do: table rows of d columns have no
W2, and learn at the given rate. A part of what MLET gains may be due to the effective learning rate of the others.
"""
_NOTES = """\
Each row is one run with one seed, and learning rates are not tuned for each row. Behind a difference stands where it
would be for {confidence:.0%} of other {split} sets of the same kind and size; another seed moves it as well. The logit
difference is the largest one, over all rows of valid and test, between the trained model and its export to plain
TorchRec tables."""
_NEXT = """\
To compare them on other data:

  mlet prepare criteo train.txt --out data/criteo
  mlet compare configs/criteo_kaggle.yaml data.path=data/criteo run.dir=runs/compare --nproc 2

`mlet prepare --help` lists the formats of raw data, and `mlet train --help` lists the settings. See also README.md."""

_NEXT_COMPRESSED = """\
Next, compare other budgets: the same command with another compression.budget and run.dir. `mlet plan` with the same
settings and --world-size shows what other budgets would keep. Tune the learning rate of each model before you draw a
conclusion. See also docs/compression.md."""


def comparison_report(result: dict[str, Any]) -> str:
    """Return what `mlet compare` prints: the table and what it means, where the results are, and what to do next."""
    failed = [_TITLES[name] for name, arm in result["arms"].items() if not arm["ok"]]
    if failed:
        ending = f"The export of {' and '.join(failed)} is outside its tolerance; `mlet verify` shows the differences."
    else:
        ending = _NEXT_COMPRESSED if SINGLE_COMPRESSED in result["arms"] else _NEXT
    files = (
        f"Results: {result['run']}/comparison.md and comparison.json; each model's run and export are beside them.\n"
        f"Charts, and what to choose: mlet report {result['run']} --out REPORT"
    )
    return "\n\n".join([comparison_table(result), files, ending])


def comparison_table(result: dict[str, Any]) -> str:
    """Return the arms as a Markdown table, and what it means.

    Args:
        result: of ``comparison.compare``.
    """
    split, arms = result["split"], result["arms"]
    compressed = SINGLE_COMPRESSED in arms
    trained = ["tables in training", "share"] if compressed else ["tables trained"]
    # "test_", or of several labels "test_click_", …
    measured = [
        key.removesuffix("auc") for key in next(iter(arms.values()), {}) if re.fullmatch(f"{split}_(.+_)?auc", key)
    ]
    metrics = [f"{each.replace('_', ' ')}{metric}" for each in measured for metric in ("AUC", "LogLoss")]
    header = ["", *trained, "tables served", *metrics, "largest logit difference"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, arm in arms.items():
        sizes = [megabytes_text(arm["trained_table_bytes"])]
        if compressed:
            share = arm["training_bytes_peak"] / arms[SINGLE]["training_bytes_peak"]
            sizes = [megabytes_text(arm["training_bytes_peak"]), f"{share:.1%}"]
        rows.append(
            [
                _title(name, compressed),
                *sizes,
                megabytes_text(min(arm["served_bytes"].values())),
                *(_metric(arm[f"{each}{metric}"]) for each in measured for metric in ("auc", "logloss")),
                _difference(arm["max_abs_logit_diff"]),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(cells)} |")
    caption = _COMPRESSED_CAPTION if compressed else _CAPTION
    compared = [_compared(each, compressed) for each in result["differences"]]
    failed = [
        f"- The run of {_title(name, compressed)} failed: {fault}, as an unlucky seed can cause. Its differences are "
        "not those of its settings; compare again with another train.seed"
        for name, arm in arms.items()
        if (fault := dense_arch_fault(arm)) is not None
    ]
    return "\n".join([*lines, "", *compared, *failed, "", caption, _NOTES.format(split=split, confidence=CONFIDENCE)])


def _compared(difference: Mapping[str, Any], compressed: bool) -> str:
    """Return what a model gains over another one, and whether that may be chance, as an entry of a list."""
    arm, other = (
        "the control" if difference[key] == CONTROL else _title(difference[key], compressed) for key in ("arm", "of")
    )
    parts = []
    for name, title, better in (("logloss", "LogLoss", -1), ("auc", "AUC", 1)):
        found = Difference(*(_number(difference[name][key]) for key in ("value", "low", "high")))
        if math.isnan(found.value):
            parts.append(f"{title} undefined")
            continue
        verdict = "may be chance"
        if not found.is_noise:
            verdict = "better" if better * found.value > 0 else "worse"
        parts.append(f"{title} {signed(found.value)} ({signed(found.low)} to {signed(found.high)}, {verdict})")
    label = f", {difference['label']}" if "label" in difference else ""
    return f"- {arm} against {other}{label}: {'; '.join(parts)}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no NaN


def _title(name: str, compressed: bool) -> str:
    return "MLET, compressed" if compressed and name == MLET else _TITLES[name]


def _metric(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _difference(value: float | None) -> str:
    if value is None:
        return "infinite"
    return f"{value:.1e}" if value else "none, bitwise identical"
