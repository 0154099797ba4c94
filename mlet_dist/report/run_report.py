"""`mlet report`: reads runs, and writes a page, charts and plain data of what smaller tables cost."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlet_dist.atomic_directory import check_free, staged_directory
from mlet_dist.formatting import to_json
from mlet_dist.pages.charts import save_png
from mlet_dist.pages.series_looks import named
from mlet_dist.quality.paired_bootstrap import Difference
from mlet_dist.report.advice import advice, rule
from mlet_dist.report.arm_details import Details, details_of
from mlet_dist.report.figures import figures_of, front
from mlet_dist.report.measured_arms import MeasuredOutput, Measurement, Quality, measure
from mlet_dist.report.measured_runs import measured_runs
from mlet_dist.report.recommendation import MARGIN, Recommendation, recommend
from mlet_dist.report.report_page import html_page
from mlet_dist.report.report_text import markdown_report, text_report


def report(
    directories: Sequence[Path],
    out: Path,
    margin: float = MARGIN,
    reference: str | None = None,
    label: str | None = None,
) -> tuple[dict[str, Any], str]:
    """Write report.html, report.json, report.md and figures/*.png into a directory that must not exist or be empty.

    Args:
        directories: of `mlet sweep`, `mlet compare` and `mlet train`.
        out: the directory.
        margin: the LogLoss by which an output may be above the reference and still count as equal.
        reference: the arm to compare with; by default the single layer with the least LogLoss on valid.
        label: of several labels, the one whose metrics count; by default the first.

    Returns:
        What report.json holds, and the text. ``advice``, ``rule``, ``reference``, ``times_smaller``,
        ``by_mean_on_valid``, ``recommended``, ``arms`` and ``outputs``: each with its ``served_bytes``,
        ``training_bytes``, ``on_front``, and by split and metric ``mean``, ``spread``, ``by_seed`` and ``difference``
        (``value``, ``low``, ``high``).

    Raises:
        UserError: as ``measured_runs`` and ``measure``, or ``out`` is not free or cannot be written.
    """
    check_free(out)
    found = measure(measured_runs(directories), reference, label)
    chosen, details = recommend(found, margin), details_of(found)
    drawn = list(figures_of(found, details, margin))
    result = _plain(found, details, chosen, margin)
    text, page = text_report(found, details, chosen, margin), html_page(found, details, chosen, drawn, margin)
    with staged_directory(out) as staged:
        (staged / "figures").mkdir()
        for each in drawn:
            save_png(each.figure, staged / "figures" / f"{each.name}.png", each.title, named(list(found.runs)))
        (staged / "report.html").write_text(page, encoding="utf-8")
        (staged / "report.json").write_text(to_json(result, indent=1) + "\n", encoding="utf-8")
        (staged / "report.md").write_text(markdown_report(found, details, chosen, margin) + "\n", encoding="utf-8")
    return result | {"out": str(out)}, text


def _plain(found: Measurement, details: Details, chosen: Recommendation, margin: float) -> dict[str, Any]:
    edge = front(found.outputs, found.result_split, lambda each: each.served_bytes)
    ratio = chosen.times_smaller
    return {
        "advice": advice(found, chosen, margin),
        "rule": rule(found, margin),
        "margin": margin,
        "reference": found.reference,
        "label": found.label,
        "times_smaller": None if ratio is None else dataclasses.asdict(ratio),
        "by_mean_on_valid": None if chosen.by_mean is None else _name(chosen.by_mean),
        "recommended": None if chosen.smallest is None else _name(chosen.smallest),
        "verdict": chosen.verdict,
        "better": [each.arm for each in chosen.better],
        "arms": {arm: _arm(found, details, arm) for arm in found.runs},
        "outputs": [
            {
                **_name(each),
                "served_bytes": each.served_bytes,
                "training_bytes": each.training_bytes,
                "on_front": each in edge,
                **{
                    split: {metric: _quality(quality) for metric, quality in metrics.items()}
                    for split, metrics in each.quality.items()
                },
            }
            for each in found.outputs
        ],
    }


def _arm(found: Measurement, details: Details, arm: str) -> dict[str, Any]:
    runs, each = found.runs[arm], details.arms[arm]
    return {
        "kind": runs[0].kind,
        "embedding_dim": runs[0].config.model.embedding_dim,
        "hidden_dim": runs[0].config.model.hidden_dim,
        "tuned": dict(runs[0].tuned),
        "seeds": [run.seed for run in runs],
        "faults": {str(seed): reason for seed, reason in found.faults.get(arm, {}).items()},
        "normalised_entropy": each.normalised_entropy,
        "calibration": each.calibration,
        "by_class": {
            name: {
                metric: {"mean": value, **_difference(difference)} for metric, (value, difference) in metrics.items()
            }
            for name, metrics in each.by_class.items()
        },
        "cost": None if each.cost is None else dataclasses.asdict(each.cost),
        "energy": None if each.energy is None else each.energy.tolist(),
        "runs": [str(run.run) for run in runs],
    }


def _name(output: MeasuredOutput) -> dict[str, str]:
    return {"arm": output.arm, "output": output.output}


def _quality(quality: Quality) -> dict[str, Any]:
    return {
        "mean": quality.mean,
        "spread": quality.spread,
        "by_seed": {str(seed): value for seed, value in quality.by_seed.items()},
        **_difference(quality.difference),
    }


def _difference(difference: Difference | None) -> dict[str, Any]:
    if difference is None or math.isnan(difference.value):
        return {"difference": None}
    return {"difference": dataclasses.asdict(difference)}
