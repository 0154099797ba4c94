"""A report in words and tables: what to choose, by which rule, and the figures behind it."""

import math
from collections.abc import Sequence

from mlet_dist.formatting import text_table
from mlet_dist.quality.paired_bootstrap import CONFIDENCE, Difference
from mlet_dist.report.arm_details import Details
from mlet_dist.report.measured_arms import MeasuredOutput, Measurement
from mlet_dist.report.recommendation import Ratio, Recommendation, times_smaller

Table = tuple[list[str], list[list[str]]]
"""The names of the columns, and rows of cells."""

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size_text(size: float) -> str:
    """Return a number of bytes with three digits."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def difference_text(difference: Difference | None) -> str:
    """Return a difference with its interval; empty if it is not known."""
    if difference is None or math.isnan(difference.value):
        return ""
    return f"{difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def advice(found: Measurement, chosen: Recommendation, margin: float) -> list[str]:
    """Return what the rule recommends, in sentences; the first is the headline."""
    return [*_smallest(found, chosen, margin), *_ratios(found, chosen, margin), *_better(found, chosen)]


def rule(found: Measurement, margin: float) -> str:
    """Return the rule of the recommendation."""
    checked = ""
    if found.result_split != found.choice_split:
        checked = f" {found.result_split} has no part in the choice, and shows whether it holds."
    return (
        f"The reference is {found.reference} in float32, by default the single layer with the least LogLoss on "
        f"{found.choice_split}. An output is equal to it if the {CONFIDENCE:.0%} interval of "
        f"its difference in LogLoss on {found.choice_split} ends below {margin:g}. Recommended is the smallest of the "
        "equal outputs, if it is smaller than the reference; of outputs of one size, one of the reference's own arm, "
        "and then the one that is cheapest to train. An arm is better if its float32 tables are no larger than "
        "the reference's and the interval "
        f"lies below 0, and if an arm of MLET is also better than its control, where it has one."
        f"{checked} Intervals are for other rows, "
        "by a paired bootstrap, and for other seeds where there are two or more, by Student's t."
    )


def _smallest(found: Measurement, chosen: Recommendation, margin: float) -> list[str]:
    reference = found.reference_output
    smallest = chosen.smallest
    if not _can_choose(found):
        lines = [
            f"There is no recommendation, because there are no predictions of single rows of {found.choice_split} by "
            f"{found.reference} in float32: `mlet sweep` keeps them if dcp is one of its outputs."
        ]
        if _difference(reference, found.result_split) is None:
            lines.append("The metrics below are those that training measured.")
        return lines
    if smallest is None:
        return [
            f"Do not bother: no output that is smaller than the float32 tables of {_called(found)} "
            f"({size_text(reference.served_bytes)}) is certain to be within {margin:g} of its LogLoss on "
            f"{found.choice_split}."
        ]
    less = f"{reference.served_bytes / smallest.served_bytes:.1f} times less than {size_text(reference.served_bytes)}"
    lines = [
        f"Serve {smallest.name}: its tables take {size_text(smallest.served_bytes)}, {less} of {_called(found)} in "
        f"float32 ({found.reference}).",
        f"Its difference in LogLoss from that is {difference_text(_difference(smallest, found.choice_split))} on "
        f"{found.choice_split}, by which it was chosen"
        + {
            None: ".",
            "holds": f", and {difference_text(_difference(smallest, found.result_split))} on {found.result_split}: it "
            f"is within {margin:g} there as well.",
            "unclear": f", and {difference_text(_difference(smallest, found.result_split))} on {found.result_split}: "
            f"whether it is within {margin:g} there, these rows and seeds cannot tell.",
            "fails": f", and {difference_text(_difference(smallest, found.result_split))} on {found.result_split}: it "
            f"is not within {margin:g} there. Do not rely on it; take more seeds, or the next larger output.",
        }[chosen.verdict],
        _how_to_train(found, smallest),
    ]
    if smallest.arm == found.reference:
        lines.append(f"It is {_called(found)} itself, quantised: do not bother with other models for their size.")
    seeds = {run.seed for run in found.runs[smallest.arm]} & {run.seed for run in found.runs[found.reference]}
    if len(seeds) == 1:
        lines.append(
            "These intervals are for other rows alone, because both have one seed in common: another seed may change "
            "the recommendation. Take five seeds."
        )
    return lines


def _can_choose(found: Measurement) -> bool:
    """Return whether there are intervals on the split by which the recommendation chooses."""
    return _difference(found.reference_output, found.choice_split) is not None


def _how_to_train(found: Measurement, output: MeasuredOutput) -> str:
    run = found.runs[output.arm][0]
    model, compression = run.config.model, run.config.compression
    parts = [f"model.embedding_dim={model.embedding_dim}", f"model.hidden_dim={model.hidden_dim or 'null'}"]
    if compression.policy != "none":
        parts += [f"compression.policy={compression.policy}", f"compression.budget={_budget(compression.budget)}"]
    parts += [f"{name}={value:.3g}" for name, value in run.tuned.items()]
    return (
        f"Its settings are those of {run.run / 'config.yaml'} ({' '.join(parts)}); export it with `mlet export "
        f"{run.run} --outputs {output.output} --out DIR`."
    )


def _budget(budget: float | str | None) -> str:
    return f"{budget:.3g}" if isinstance(budget, float) else str(budget)


def _ratios(found: Measurement, chosen: Recommendation, margin: float) -> list[str]:
    if chosen.times_smaller is None:
        return []
    own = [each for each in found.outputs if each.arm == found.reference]
    alone = times_smaller(found, margin, own)
    assert alone is not None
    return [
        f"By the mean differences on {found.result_split}, tables can be {_ratio(chosen.times_smaller)} times smaller "
        f"within {margin:g} of the LogLoss of {_called(found)}; by quantising {_called(found)} alone, "
        f"{_ratio(alone)} times."
    ]


def _called(found: Measurement) -> str:
    """Return what sentences call the reference."""
    is_single = found.runs[found.reference][0].kind == "single"
    return "the single layer" if is_single else "the reference"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.1f} ({CONFIDENCE:.0%} interval {ratio.low:.1f} to {ratio.high:.1f})"


def _better(found: Measurement, chosen: Recommendation) -> list[str]:
    lines = []
    split, result = found.choice_split, found.result_split
    for each in chosen.better:
        also = "" if result == split else f" and {difference_text(_difference(each, result))} on {result}"
        lines.append(
            f"{each.arm} is better than {_called(found)} at no more served bytes: "
            f"{difference_text(_difference(each, split))} in LogLoss on {split}{also}."
        )
    for each in chosen.of_controls:
        lines.append(
            f"{each.arm} is better than {_called(found)} on {split} "
            f"({difference_text(_difference(each, split))}), but not than its control, a single layer with MLET's "
            "effective learning rate: it gains by the learning rate, not by the factorisation."
        )
    rivals = any(arm != found.reference and runs[0].kind == "mlet" for arm, runs in found.runs.items())
    if rivals and not lines and _can_choose(found):
        lines.append(
            f"No arm is better than {_called(found)} by more than chance on {split}: do not bother with MLET for "
            "its quality at the same served bytes."
        )
    return lines


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
    names = ["ids", "of the lookups", "arm", "LogLoss", "from the reference", "AUC", "from the reference"]
    rows = []
    for name in details.arms[found.reference].by_class:
        for arm, each in details.arms.items():
            if name in each.by_class:
                cells = [name, f"{details.class_shares[name]:.0%}", arm]
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
        budget = "" if compression.policy == "none" else f"{compression.policy}, {_budget(compression.budget)}"
        tuned = [f"{runs[0].tuned[name]:.3g}" if name in runs[0].tuned else "" for name in names]
        rows.append([arm, str(model.embedding_dim), str(model.hidden_dim or "-"), budget, *tuned])
    return ["arm", "d", "k", "compression", *names], rows


def faults(found: Measurement) -> list[str]:
    """Return a line for each run that says nothing of its settings."""
    return [f"{arm}, seed {seed}: {reason}" for arm, each in found.faults.items() for seed, reason in each.items()]


def text_report(found: Measurement, details: Details, chosen: Recommendation, margin: float) -> str:
    """Return what `mlet report` prints."""
    parts: list[Sequence[str]] = [
        advice(found, chosen, margin),
        text_table(*arms_table(found, details), left=1),
        text_table(*costs_table(found, details), left=1),
        text_table(*outputs_table(found), left=2),
    ]
    if left_out := faults(found):
        parts.append(["Left out of all means:", *left_out])
    return "\n\n".join("\n".join(part) for part in parts)


def markdown_report(found: Measurement, details: Details, chosen: Recommendation, margin: float) -> str:
    """Return the same as Markdown, with all tables of the page."""
    parts = ["\n".join(f"- {line}" for line in advice(found, chosen, margin)), rule(found, margin)]
    for names, rows in (
        arms_table(found, details),
        costs_table(found, details),
        outputs_table(found),
        classes_table(found, details),
        settings_table(found),
    ):
        if rows:
            lines = [names, ["---", *["--:"] * (len(names) - 1)], *rows]
            parts.append(
                "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
            )
    if left_out := faults(found):
        parts.append("Left out of all means:\n\n" + "\n".join(f"- {line}" for line in left_out))
    return "\n\n".join(parts).replace("<", "&lt;")  # a name in angle brackets is no HTML


def _difference(output: MeasuredOutput, split: str) -> Difference | None:
    quality = output.loss(split)
    return None if quality is None else quality.difference


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
