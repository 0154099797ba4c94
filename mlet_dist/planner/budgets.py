"""What a compression budget buys: the rows and the lookups that tables of several budgets keep."""

import dataclasses
from typing import Any

from mlet_dist.errors import UserError
from mlet_dist.formatting import text_table
from mlet_dist.models.row_widths import Sizes, budget_bytes, static_ranges
from mlet_dist.models.width_shares import total_lookups, width_shares
from mlet_dist.planner.configurations import Case, budget_share

SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)
"""The budgets that are compared, as shares of the single-layer tables' bytes."""


def budget_report(case: Case) -> dict[str, Any]:
    """Return what the budget of a compressed case keeps, and what others would with the same widths and limits.

    Args:
        case: with the counts of its data set.

    Returns:
        Plain data: ``single_layer_training_bytes``; the keys of an entry for the config's own budget; and ``budgets``,
        an entry for each of ``SHARES``. An entry has ``budget`` (as a share), ``budget_bytes``, ``training_bytes``,
        ``kept_rows`` (the share of rows that are stored), ``kept_lookups`` (the share of lookups that find them),
        ``wide_lookups`` (the share of lookups of rows with d columns or more) and ``widths`` (the shares of rows and
        of lookups by width); all but the first two are null if the budget is too small.
    """
    spec = case.spec
    sizes = Sizes.of(spec.model, case.config.optimizer.name, case.config.compression, spec.embedding_dims)
    single = sizes.single({table.name: table.num_embeddings for table in spec.tables})
    return {
        "single_layer_training_bytes": single,
        **_entry(case, sizes, single, budget_share(case)),
        "budgets": [_entry(case, sizes, single, share) for share in SHARES],
    }


def _entry(case: Case, sizes: Sizes, single: int, share: float) -> dict[str, Any]:
    compression = dataclasses.replace(case.config.compression, budget=share)
    found: dict[str, Any] = {"budget": share, "budget_bytes": budget_bytes(compression, single)}
    keys = ("training_bytes", "kept_rows", "kept_lookups", "wide_lookups", "widths")
    try:
        settings = {table.name: table.settings for table in case.spec.tables}
        ranges = static_ranges(case.counts, compression, settings, sizes)
    except UserError:
        return found | dict.fromkeys(keys)
    lookups = total_lookups(case.counts)
    shares = width_shares(ranges, lookups)
    kept = [each for each in shares if each.width]
    wide = sum(
        each.share * lookups[name]
        for name, of_table in ranges.items()
        for each in of_table
        if each.width >= sizes.of_table(name).embedding_dim
    )
    kept_lookups = sum(each.lookups for each in kept)
    values = (
        sizes.trained(ranges),
        sum(each.rows for each in kept),
        kept_lookups,
        min(kept_lookups, wide / (sum(lookups.values()) or 1.0)),
        [dataclasses.asdict(each) for each in shares],
    )
    return found | dict(zip(keys, values, strict=True))


def budget_lines(report: dict[str, Any]) -> list[str]:
    """Return the lines in which `mlet plan` shows a ``budget_report``."""
    head = ["budget", "MB in training", "rows stored", "lookups stored", "of d columns or more", "not stored"]
    entries = {each["budget"]: each for each in (report, *report["budgets"])}
    return [
        "what a budget keeps of the rows, and of the lookups of the training split; 100% are single-layer tables",
        *text_table(head, [_cells(entries[share]) for share in sorted(entries, reverse=True)], left=0),
    ]


def _cells(entry: dict[str, Any]) -> list[str]:
    if entry["training_bytes"] is None:
        return [f"{entry['budget']:.0%}", "too small", *["-"] * 4]
    lookups = (entry["kept_lookups"], entry["wide_lookups"], max(0.0, 1 - entry["kept_lookups"]))
    shares = (f"{share:.1%}" for share in (entry["kept_rows"], *lookups))
    return [f"{entry['budget']:.0%}", f"{entry['training_bytes'] / 1e6:,.3f}", *shares]
