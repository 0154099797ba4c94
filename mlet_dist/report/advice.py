"""What the recommendation says in plain sentences, and the rule behind it."""

from mlet_dist.formatting import size_text
from mlet_dist.quality.paired_bootstrap import CONFIDENCE, Difference
from mlet_dist.report.measured_arms import MeasuredOutput, Measurement, budget_text, difference_text
from mlet_dist.report.recommendation import Ratio, Recommendation, times_smaller

_FEW_ROWS = 100


def advice(found: Measurement, chosen: Recommendation, margin: float) -> list[str]:
    """Return what the rule recommends, in sentences; the first is the headline."""
    smaller = [*_smallest(found, chosen, margin), *_ratios(found, chosen, margin)]
    better = _better(found, chosen)
    better_first = chosen.smallest is None and bool(chosen.better)
    lines = [*better, *smaller] if better_first else [*smaller, *better]
    return [*lines, *_failed(found, chosen), *_few_rows(found)]


def rule(found: Measurement, margin: float) -> str:
    """Return the rule of the recommendation."""
    checked = ""
    if found.result_split != found.choice_split:
        checked = f" The split {found.result_split} has no part in the choice, and shows whether it holds."
    return (
        f"The reference is {found.reference} in float32, by default the single layer with the least LogLoss on "
        f"{found.choice_split}. An output is equal to it if the {CONFIDENCE:.0%} interval of "
        f"its difference in LogLoss on {found.choice_split} ends below {margin:g}. Recommended is the smallest of the "
        "equal outputs, if it is smaller than the reference; of outputs of one size, one of the reference's own arm, "
        "and then the one that is cheapest to train. An arm is better if its float32 tables are no larger than "
        "the reference's and the interval "
        f"lies below 0; for an arm of MLET that has a control, the interval of its difference from that, too."
        f"{checked} Intervals are for other rows, "
        "by a paired bootstrap, and for other seeds where there are two or more, by Student's t."
    )


def _smallest(found: Measurement, chosen: Recommendation, margin: float) -> list[str]:
    reference = found.reference_output
    smallest = chosen.smallest
    if not _can_choose(found):
        lines = [
            f"There is no recommendation, because there are no predictions of single rows of {found.choice_split} by "
            f"{found.reference} in float32: `mlet compare` keeps them, and `mlet sweep` if dcp is one of its outputs."
        ]
        if _difference(reference, found.result_split) is None:
            lines.append("The metrics below are those that training measured.")
        return lines
    if smallest is None:
        tables = f"the float32 tables of {_called(found)} ({size_text(reference.served_bytes)})"
        none = f"output that was measured is smaller than {tables}."
        if any(output.served_bytes < reference.served_bytes for output in found.outputs):
            none = (
                f"output that is smaller than {tables} is certain to be within {margin:g} of its LogLoss on "
                f"{found.choice_split}."
            )
        return [f"No {none}" if chosen.better else f"Do not bother: no {none}"]
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
    if why := _of_rows_alone(found, smallest.arm):
        lines.append(
            f"These intervals are for other rows alone, because {why}: another seed may change the recommendation. "
            "Take five seeds."
        )
    return lines


def _of_rows_alone(found: Measurement, arm: str) -> str:
    """Return why the intervals of an arm's difference from the reference are not for other seeds; empty if they are."""
    own, others = ({run.seed for run in found.runs[each]} for each in (arm, found.reference))
    if common := own & others:
        return "both have one seed in common" if len(common) == 1 else ""
    return "they have no seed in common, and one of them has a single seed" if 1 in (len(own), len(others)) else ""


def _can_choose(found: Measurement) -> bool:
    """Return whether there are intervals on the split by which the recommendation chooses."""
    return _difference(found.reference_output, found.choice_split) is not None


def _how_to_train(found: Measurement, output: MeasuredOutput) -> str:
    run = found.runs[output.arm][0]
    model, compression = run.config.model, run.config.compression
    parts = [f"model.embedding_dim={model.embedding_dim}", f"model.hidden_dim={model.hidden_dim or 'null'}"]
    if compression.policy != "none":
        parts += [f"compression.policy={compression.policy}", f"compression.budget={budget_text(compression.budget)}"]
    parts += [f"{name}={value:.3g}" for name, value in run.tuned.items()]
    return (
        f"Its settings are those of {run.run / 'config.yaml'} ({' '.join(parts)}); export it with `mlet export "
        f"{run.run} --outputs {output.output} --out DIR`."
    )


def _ratios(found: Measurement, chosen: Recommendation, margin: float) -> list[str]:
    if chosen.times_smaller is None:
        return []
    own = [each for each in found.outputs if each.arm == found.reference]
    alone = times_smaller(found, margin, own)
    assert alone is not None
    lines = [
        f"By the mean differences on {found.result_split}, tables can be {_ratio(chosen.times_smaller)} times smaller "
        f"within {margin:g} of the LogLoss of {_called(found)}; by quantising {_called(found)} alone, "
        f"{_ratio(alone)} times."
    ]
    if (output := chosen.by_mean) is not None:
        times = found.reference_output.served_bytes / output.served_bytes
        if times > 1:
            lines.append(
                f"Chosen in this way on {found.choice_split}, they are {times:.1f} times smaller ({output.name}), with "
                f"{difference_text(_difference(output, found.result_split))} on {found.result_split}, which has no "
                "part in that choice."
            )
        elif chosen.times_smaller.value > 1:
            lines.append(f"By those on {found.choice_split}, no smaller tables are within {margin:g}.")
    return lines


def _few_rows(found: Measurement) -> list[str]:
    # The bootstrap of one row has intervals of no width.
    return [
        f"The split {split} has {rows:,} row{'s' * (rows > 1)} alone. Intervals of so few rows are too narrow: do not "
        "rely on them."
        for split, rows in found.rows.items()
        if rows < _FEW_ROWS
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
        if all(control in found.runs for control in found.controls[each.arm]):
            why = (
                "but that it is also better than its control, a single layer with MLET's effective learning rate, is "
                "not certain: the gain may be due to the learning rate, and not to the factorisation."
            )
        else:
            why = (
                "but all runs of its control, a single layer with MLET's effective learning rate, failed: whether "
                "it gains by the learning rate or by the factorisation is not known."
            )
        lines.append(
            f"{each.arm} is better than {_called(found)} on {split} "
            f"({difference_text(_difference(each, split))}), {why}"
        )
    named = [each.arm for each in (*chosen.better, *chosen.of_controls)]
    of_named = [control for arm in named for control in found.controls.get(arm, ()) if control in found.runs]
    if few := [arm for arm in dict.fromkeys((*named, *of_named)) if _of_rows_alone(found, arm)]:
        lines.append(
            f"Intervals of {', '.join(few)} are for other rows alone, because they have no two seeds in common with "
            f"{found.reference}: another seed may change what is better. Take five seeds."
        )
    rivals = any(arm != found.reference and runs[0].kind == "mlet" for arm, runs in found.runs.items())
    if rivals and not lines and _can_choose(found):
        lines.append(
            f"No arm is better than {_called(found)} by more than chance on {split}: do not bother with MLET for "
            "its quality at the same served bytes."
        )
    return lines


def _failed(found: Measurement, chosen: Recommendation) -> list[str]:
    """Return a sentence on each arm of the advice some of whose runs failed, which its means leave out."""
    named = [*([] if chosen.smallest is None else [chosen.smallest]), *chosen.better, *chosen.of_controls]
    return [
        f"{len(faults)} of {len(faults) + len(found.runs[arm])} runs of {arm} failed, and its means leave them out: "
        "how often it fails is a part of its quality."
        for arm in dict.fromkeys(each.arm for each in named)
        if (faults := found.faults.get(arm))
    ]


def _difference(output: MeasuredOutput, split: str) -> Difference | None:
    quality = output.loss(split)
    return None if quality is None else quality.difference
