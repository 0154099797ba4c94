"""Shows a plan as text and as an HTML page."""

import html
from typing import Any

from mlet_dist.embeddings.planning.cost_model import gigabytes
from mlet_dist.formatting import text_table
from mlet_dist.planner.budgets import budget_lines

_KINDS = {"weights": "#4c72b0", "optimizer": "#dd8452", "buffers": "#55a868", "dense": "#8172b3", "process": "#937860"}
_PARTS = ("latency", "network", "memory", "compute", "host", "skew")
_LEFT, _WIDTH, _BAR, _TOP = 190, 980, 26, 60
_TEXT_CHARACTERS, _PAGE_CHARACTERS = 40, 18  # of a list of ranks, in the text and on the page


def text_report(plan: dict[str, Any]) -> str:
    """Return the text that `mlet plan` prints."""
    device, compression = plan["device"], plan.get("compression")
    # Columns for host memory are shown only if it holds rows, which is the exception.
    hosted = any(each["host"] for each in plan["ranks"])
    kinds, parts = (
        [*_kinds_of(plan), "total"],
        ["step_s", "latency_s", "network_s", "memory_s", "compute_s", "host_floor_s", "skew_s"],
    )
    if hosted:
        kinds.append("host")
        parts.append("host_s")
    ranks = [
        [_short(each["ranks"]), each["tables"], f"{each['rows']:,}", *(f"{each[kind] / 1e9:.3f}" for kind in kinds)]
        for each in plan["ranks"]
    ]
    configurations = [
        [
            each["name"],
            f"{each['memory'] / 1e9:.2f}" + ("" if each["fits"] else " (too much)"),
            f"{each['sent_bytes'] / 1e6:,.2f}",
            *(f"{1e3 * each[part]:.3f}" for part in parts),
            each["bound"],
        ]
        for each in plan["configurations"]
    ]
    per_rank = f"{gigabytes(device['usable_memory'])} of {gigabytes(device['memory'])} per rank"
    head = (
        f"{plan['world_size']:,} ranks of {device['name']}, {plan['local_world_size']} per node, global batch "
        f"{plan['batch_size']:,}; {per_rank} are for the model"
    )
    return "\n".join(
        [
            head,
            *([] if plan["shortage"] is None else [f"does not fit: {plan['shortage']}"]),
            "",
            *(f"plan  {line}" for line in plan["summary"]),
            *([] if compression is None else compression["summary"]),
            "",
            "memory per rank in GB (10^9 bytes); one line for ranks with the same tables and nearly the same memory",
            *text_table(["ranks", "tables", "rows", *kinds], ranks, left=1),
            "",
            _copy_line(plan),
            "",
            *_predicted_lines(plan),
            "",
            "cost of a step on the slowest rank, whose parts are assumed to follow one another",
            *text_table(
                ["configuration", "GB", "MB sent", "step ms", "latency", "network", "memory", "compute", "host", "skew"]
                + (["host link"] if hosted else [])
                + ["bound by"],
                configurations,
                left=1,
            ),
            *([] if compression is None else ["", *budget_lines(compression)]),
        ]
    )


def _kinds_of(plan: dict[str, Any]) -> list[str]:
    """Return the kinds of memory to show: that of the process counts on CPUs alone."""
    return [kind for kind in _KINDS if kind != "process" or any(each[kind] for each in plan["ranks"])]


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


def html_page(plan: dict[str, Any]) -> str:
    """Return an HTML page of its own: a stacked bar of memory for each group of equal ranks, and the text."""
    device, ranks = plan["device"], plan["ranks"]
    scale = (_WIDTH - _LEFT - 190) / max(device["memory"], *(each["total"] for each in ranks))
    height = _TOP + _BAR * len(ranks) + 40
    parts = []
    for index, each in enumerate(ranks):
        x, y = float(_LEFT), _TOP + index * _BAR
        label = html.escape(f"{_short(each['ranks'], _PAGE_CHARACTERS)} ({each['count']})")
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{label}</text>')
        for kind, colour in _KINDS.items():
            width = each[kind] * scale
            title = f"<title>{kind}: {gigabytes(each[kind])}</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.2f}" height="{_BAR - 6}" fill="{colour}">{title}</rect>'
            )
            x += width
        host = f" + {gigabytes(each['host'])} on the host" if each["host"] else ""
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{gigabytes(each["total"])}{host}</text>')
    for share, text in (("usable_memory", "for the model"), ("memory", "device")):
        x = _LEFT + device[share] * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{height - 34}" stroke="#c44e52"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 18 if share == "memory" else height - 4}" text-anchor="middle">')
        parts.append(f"{text}: {gigabytes(device[share])}</text>")
    for index, kind in enumerate(_kinds_of(plan)):
        x, colour = _LEFT + 130 * index, _KINDS[kind]
        parts.append(f'<rect x="{x}" y="16" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="28">{kind}</text>')
    title = html.escape(f"Memory by rank: {plan['world_size']:,} x {device['name']}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title></head>\n'
        f'<body style="font-family: sans-serif"><h1 style="font-size: 18px">{title}</h1>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" font-size="12"'
        ' style="max-width: 100%">\n'
        + "\n".join(parts)
        + f'\n</svg>\n<pre style="overflow-x: auto">{html.escape(text_report(plan))}</pre></body></html>\n'
    )


def _short(ranks: str, most: int = _TEXT_CHARACTERS) -> str:
    """Return a list of ranks, cut off after ``most`` characters."""
    return ranks if len(ranks) <= most else ranks[:most].rpartition(",")[0] + ", …"
