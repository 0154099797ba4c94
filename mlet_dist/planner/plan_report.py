"""Shows a plan as text."""

from typing import Any

from mlet_dist.embeddings.planning.cost_model import gigabytes
from mlet_dist.formatting import text_table
from mlet_dist.planner.budgets import budget_lines

_KINDS = ("weights", "optimizer", "buffers", "dense", "process")
MEMORY_CAPTION = (
    "memory per rank in GB (10^9 bytes); one line for ranks with the same tables and nearly the same memory"
)
COST_CAPTION = "cost of a step on the slowest rank, whose parts are assumed to follow one another"

Table = tuple[list[str], list[list[str]]]
"""The names of the columns, and rows of cells."""

_NAME = 16  # characters of the names of facts
_PARTS = ("latency", "network", "memory", "compute", "host", "skew")
_TEXT_CHARACTERS = 40  # of a list of ranks


def text_report(plan: dict[str, Any]) -> str:
    """Return the text that `mlet plan` prints."""
    compression = plan.get("compression")
    return "\n".join(
        [
            headline(plan),
            *([] if plan["shortage"] is None else [f"does not fit: {plan['shortage']}"]),
            "",
            *(f"plan  {line}" for line in plan["summary"]),
            *([] if compression is None else compression["summary"]),
            "",
            MEMORY_CAPTION,
            *text_table(*ranks_table(plan), left=1),
            "",
            _copy_line(plan),
            "",
            *_predicted_lines(plan),
            "",
            COST_CAPTION,
            *text_table(*configurations_table(plan), left=1),
            *([] if compression is None else ["", *budget_lines(compression)]),
        ]
    )


def headline(plan: dict[str, Any]) -> str:
    """Return what the plan is for."""
    device = plan["device"]
    per_rank = f"{gigabytes(device['usable_memory'])} of {gigabytes(device['memory'])} per rank"
    return (
        f"{plan['world_size']:,} ranks of {device['name']}, {plan['local_world_size']} per node, global batch "
        f"{plan['batch_size']:,}; {per_rank} are for the model"
    )


def kinds_of(plan: dict[str, Any]) -> list[str]:
    """Return the kinds of memory of a rank to show: that of the process counts on CPUs alone."""
    return [kind for kind in _KINDS if kind != "process" or any(each[kind] for each in plan["ranks"])]


def ranks_table(plan: dict[str, Any]) -> Table:
    """Return the memory of the ranks."""
    # Columns for host memory are shown only if it holds rows, which is the exception.
    kinds = [*kinds_of(plan), "total", *(["host"] if _hosted(plan) else [])]
    rows = [
        [
            short_ranks(each["ranks"]),
            str(each["tables"]),
            f"{each['rows']:,}",
            *(f"{each[kind] / 1e9:.3f}" for kind in kinds),
        ]
        for each in plan["ranks"]
    ]
    return ["ranks", "tables", "rows", *kinds], rows


def configurations_table(plan: dict[str, Any]) -> Table:
    """Return what a step costs in each configuration."""
    parts = ["step_s", "latency_s", "network_s", "memory_s", "compute_s", "host_floor_s", "skew_s"]
    names = ["configuration", "GB", "MB sent", "step ms", "latency", "network", "memory", "compute", "host", "skew"]
    if _hosted(plan):
        parts.append("host_s")
        names.append("host link")
    rows = [
        [
            each["name"],
            f"{each['memory'] / 1e9:.2f}" + ("" if each["fits"] else " (too much)"),
            f"{each['sent_bytes'] / 1e6:,.2f}",
            *(f"{1e3 * each[part]:.3f}" for part in parts),
            each["bound"],
        ]
        for each in plan["configurations"]
    ]
    return [*names, "bound by"], rows


def facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what else is known of the plan, by name: checkpoints, the predicted step, its collectives and rates."""
    lines = [_copy_line(plan), *_predicted_lines(plan)]
    return [(line[:_NAME].strip(), line[_NAME:]) for line in lines]


def _hosted(plan: dict[str, Any]) -> bool:
    return any(each["host"] for each in plan["ranks"])


def _copy_line(plan: dict[str, Any]) -> str:
    copy, device = plan["checkpoint_copy"], plan["device"]
    line = (
        f"checkpoint      its copy in host memory takes up to {gigabytes(copy['bytes_per_rank'])} a rank, "
        f"{gigabytes(copy['bytes_per_node'])} a node"
    )
    if copy["fits"]:
        return line
    given = device["memory"] if device["kind"] == "cpu" else device["host_memory"]
    return f"{line}: with the rows that are there, more than the {gigabytes(given)} of host memory a rank allow"


def _predicted_lines(plan: dict[str, Any]) -> list[str]:
    """Return lines about the predicted step: its parts, its lower bound, its collectives, and where rates come from."""
    predicted = plan["predicted_step_ms"]
    parts = [f"{name} {predicted[name]:.3g}" for name in _PARTS]
    counts = [
        f"{each['count']} {each['collective']}" + (f" of {each['ranks']}" if each["scope"] != "all" else "")
        for each in plan["collectives"]
    ]
    number = sum(each["count"] for each in plan["collectives"])
    busiest, bound = plan["busiest_owner"], predicted["lower_bound"]
    skew = (
        "ids are assumed to be even: without counts of a data set's vocabulary, the skew of owners is not known, and "
        "the times are lower than those of skewed ids"
        if busiest is None
        else f"the busiest owner of rows is asked {busiest:.2f} times the mean, by the counts of the data set"
    )
    return [
        f"predicted step  {predicted['total']:.3g} ms = {' + '.join(parts)}",
        *(
            []
            if bound is None
            else [f"lower bound     {bound:.3g} ms, which no run undercuts: the longest part at peak rates"]
        ),
        f"collectives     {number} a step" + (f": {', '.join(counts)}" if counts else ""),
        *(f"rates           {line}" for line in plan.get("rates", [])),
        *([f"skew            {skew}"] if plan["world_size"] > 1 else []),
    ]


def short_ranks(ranks: str, most: int = _TEXT_CHARACTERS) -> str:
    """Return a list of ranks, cut off after ``most`` characters."""
    return ranks if len(ranks) <= most else ranks[:most].rpartition(",")[0] + ", …"
