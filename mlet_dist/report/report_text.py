"""A report as text and as Markdown: the recommendation, and the tables of all measurements."""

import math
from collections.abc import Sequence

from mlet_dist.formatting import size_text, text_table
from mlet_dist.report.advice import advice, rule
from mlet_dist.report.arm_details import Details
from mlet_dist.report.measured_arms import MeasuredOutput, Measurement, budget_text, difference_text
from mlet_dist.report.recommendation import Recommendation

Table = tuple[list[str], list[list[str]]]
"""The names of the columns, and rows of cells."""


def text_report(found: Measurement, details: Details, chosen: Recommendation, margin: float) -> str:
    """Return what `mlet report` prints."""
    parts: list[Sequence[str]] = [
        advice(found, chosen, margin),
        text_table(*arms_table(found, details), left=1),
        [*text_table(*costs_table(found, details), left=1), *load_note(details)],
        text_table(*outputs_table(found), left=2),
    ]
    if left_out := faults(found):
        parts.append(["Left out of all means:", *left_out])
    return "\n\n".join("\n".join(part) for part in parts)


def markdown_report(found: Measurement, details: Details, chosen: Recommendation, margin: float) -> str:
    """Return the same as Markdown, with all tables of the page."""
    parts = ["\n".join(f"- {line}" for line in advice(found, chosen, margin)), rule(found, margin)]
    for (names, rows), notes in (
        (arms_table(found, details), []),
        (costs_table(found, details), load_note(details)),
        (outputs_table(found), []),
        (classes_table(found, details), []),
        (settings_table(found), []),
    ):
        if rows:
            lines = [names, ["---", *["--:"] * (len(names) - 1)], *rows]
            parts.append(
                "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
            )
            parts += notes
    if left_out := faults(found):
        parts.append("Left out of all means:\n\n" + "\n".join(f"- {line}" for line in left_out))
    return "\n\n".join(parts).replace("<", "&lt;")  # a name in angle brackets is no HTML


def arms_table(found: Measurement, details: Details) -> Table:
    """Return a row for each arm with float32 tables: sizes and quality."""
    split = found.result_split
    names = [
        "arm", "good runs", "served", f"{split} LogLoss", "from the reference", f"{split} AUC", "from the reference",
        "normalised entropy", "calibration",
    ]  # fmt: skip
    rows = []
    for arm, runs in found.runs.items():
        output, each = found.float_output(arm), details.arms[arm]
        rows.append(
            [
                arm,
                f"{len(runs)} of {len(runs) + len(found.faults.get(arm, {}))}",
                size_text(output.served_bytes),
                *_quality(found, output, "logloss"),
                *_quality(found, output, "auc"),
                "" if each.normalised_entropy is None else f"{each.normalised_entropy:.4f}",
                "" if each.calibration is None else f"{each.calibration:.3f}",
            ]
        )
    return names, rows


def costs_table(found: Measurement, details: Details) -> Table:
    """Return a row for each arm: what it took in training, and beside the reference."""
    names = [
        "arm",
        "tables in training",
        "step ms",
        "beside the reference",
        "samples/s",
        "peak memory",
        "device",
        "ranks",
    ]
    rows = []
    base = details.arms[found.reference].cost
    for arm in found.runs:
        cost = details.arms[arm].cost
        cells = [arm, size_text(found.float_output(arm).training_bytes)]
        if cost is not None:
            beside = "" if base is None else f"{cost.step_ms / base.step_ms:.2f}"
            cells += [f"{cost.step_ms:.3g}", beside, f"{cost.samples_per_s:,.0f}", size_text(cost.peak_memory)]
            cells += [cost.device, str(cost.ranks)]
        rows.append(cells + [""] * (len(names) - len(cells)))
    return names, rows


def load_note(details: Details) -> list[str]:
    """Return a sentence if arms were timed while several runs shared the machine."""
    arms: dict[int | None, list[str]] = {}
    for arm, each in details.arms.items():
        if each.cost is not None:
            arms.setdefault(each.cost.runs_at_once, []).append(arm)
    if not any(number is not None and number > 1 for number in arms):
        return []
    if len(arms) == 1:
        (number,) = arms
        return [
            f"Step times were measured with up to {number} runs at a time on one machine; a run that has it to itself "
            "may be faster."
        ]
    numbers = [f"{'not known' if number is None else number} ({', '.join(names)})" for number, names in arms.items()]
    return [
        "Step times were measured with different numbers of runs at a time on one machine, so that they do not compare "
        f"across these: at most {'; '.join(numbers)}."
    ]


def outputs_table(found: Measurement) -> Table:
    """Return a row for each output of each arm, the smallest first."""
    split = found.result_split
    names = ["arm", "tables", "served", "times smaller", f"{split} LogLoss", "from the reference"]
    base = found.reference_output.served_bytes
    rows = [
        [
            each.arm,
            each.encoding,
            size_text(each.served_bytes),
            f"{base / each.served_bytes:.1f}",
            *_quality(found, each, "logloss"),
        ]
        for each in sorted_outputs(found)
    ]
    return names, rows


def sorted_outputs(found: Measurement) -> list[MeasuredOutput]:
    """Return the outputs that have metrics of the results' split, the smallest first."""
    known = [each for each in found.outputs if each.loss(found.result_split) is not None]
    return sorted(known, key=lambda each: each.served_bytes)


def classes_table(found: Measurement, details: Details) -> Table:
    """Return the quality of each arm by class of ids; no rows without the data set or scores."""
    names = ["arm", "ids", "of the lookups", "LogLoss", "from the reference", "AUC", "from the reference"]
    rows = []
    for name in details.arms[found.reference].by_class:
        for arm, each in details.arms.items():
            if name in each.by_class:
                cells = [arm, name, f"{details.class_shares[name]:.0%}"]
                for metric in ("logloss", "auc"):
                    value, difference = each.by_class[name][metric]
                    cells += [f"{value:.4f}", "" if arm == found.reference else difference_text(difference)]
                rows.append(cells)
    return names, rows


def settings_table(found: Measurement) -> Table:
    """Return the settings of each arm that others do not have, or that a sweep chose."""
    names = list(dict.fromkeys(name for runs in found.runs.values() for name in runs[0].tuned))
    rows = []
    for arm, runs in found.runs.items():
        model, compression = runs[0].config.model, runs[0].config.compression
        budget = "" if compression.policy == "none" else f"{compression.policy}, {budget_text(compression.budget)}"
        tuned = [f"{runs[0].tuned[name]:.3g}" if name in runs[0].tuned else "" for name in names]
        rows.append([arm, str(model.embedding_dim), str(model.hidden_dim or "-"), budget, *tuned])
    return ["arm", "d", "k", "compression", *names], rows


def faults(found: Measurement) -> list[str]:
    """Return a line for each run that failed."""
    return [f"{arm}, seed {seed}: {reason}" for arm, each in found.faults.items() for seed, reason in each.items()]


def _quality(found: Measurement, output: MeasuredOutput, metric: str) -> list[str]:
    """Return a metric on the split of the results, with its spread, and its difference from the reference."""
    quality = output.quality.get(found.result_split, {}).get(metric)
    if quality is None:
        return ["", ""]
    if math.isnan(quality.mean):
        return ["undefined", ""]
    spread = "" if quality.spread is None else f" ± {quality.spread:.4f}"
    difference = "reference" if output == found.reference_output else difference_text(quality.difference)
    return [f"{quality.mean:.4f}{spread}", difference]
