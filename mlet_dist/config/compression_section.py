"""The section `compression` of a config: how tables are made smaller while they are trained."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from mlet_dist.config.byte_sizes import ByteSize
from mlet_dist.config.limits import MAX_COLUMNS, MAX_STEPS
from mlet_dist.config.parser import setting
from mlet_dist.config.table_settings import matching_entries


@dataclass(frozen=True)
class TableCompressionConfig:
    """Limits on the widths of one table's rows. With both the same, the whole table has that width."""

    min_width: int = setting(
        "No row of this table has fewer columns; one of the widths. 0: rows may be left out.",
        0,
        at_least=0,
        at_most=MAX_COLUMNS,
        multiple_of=4,
    )
    max_width: int | None = setting(
        "No row of this table has more columns; one of the widths. null: the largest of them.",
        None,
        at_least=4,
        at_most=MAX_COLUMNS,
        multiple_of=4,
    )


@dataclass(frozen=True)
class CompressionConfig:
    """How tables are made smaller while they are trained, by giving rows of different frequency different widths."""

    preset: Literal["recommended", "fiited"] | None = setting(
        "Sets those settings of this section that have their default value and are not given on the command line. "
        "recommended: static, as the results in the documentation recommend. fiited: FIITED (arXiv:2401.04408), "
        "adaptive with nested false. null: none. A run's own config.yaml has the settings instead.",
        None,
    )
    policy: Literal["none", "static", "adaptive"] = setting(
        "none: all rows of W1 have hidden_dim columns. static: a row gets the more columns the more often the training "
        "split looks it up, and the rarest rows get none (see shared_rows); widths are chosen before training, "
        "within budget. Ids must be sorted by descending frequency, as vocabularies are; tables are row_wise, with "
        "exchange unique_rows. adaptive: begins as static; then rows with large gradients take the place of rows with "
        "small ones, so that tables follow ids whose frequency changes over time.",
        "none",
    )
    budget: float | ByteSize = setting(
        "Bytes of the tables in training (rows, W2 and the optimizer's state, over all ranks): a size such as 12GB or "
        "4GiB (KB, MB, GB, TB: powers of 1,000; KiB, MiB, GiB, TiB: powers of 1,024), or a share such as 0.5 or 50% of "
        "those of single-layer tables of embedding_dim columns with the same optimizer.",
        0.5,
        above=0,
        at_most=1e6,
    )
    nested: bool = setting(
        "adaptive: true moves whole rows between widths. false cuts rows into chunks of equally many columns, each of "
        "which is kept or dropped by its own gradient, whatever the row's other chunks are.",
        True,
    )
    chunks: int = setting("adaptive with nested false: the number of chunks of a row.", 8, at_least=2, at_most=1024)
    widths: tuple[int, ...] | None = setting(
        "List of the widths that a row may have, besides 0; multiples of 4. null: hidden_dim, its halves down to "
        "embedding_dim, embedding_dim, and a half and a quarter of it.",
        None,
        at_least=4,
        at_most=MAX_COLUMNS,
        multiple_of=4,
        min_length=1,
    )
    alpha: float = setting(
        "A row's width grows as its number of lookups to this power, before it is rounded down to one of the widths.",
        0.5,
        at_least=0.01,
        at_most=10,
    )
    shared_rows: bool = setting(
        "static: true lets the rows of a table that get no columns share one row of embedding_dim columns, which "
        "learns from all of them; false lets them read zero.",
        True,
    )
    interval: int = setting(
        "adaptive: steps between two passes over a row, in which it may change its width. The passes of different rows "
        "are spread over the steps.",
        1000,
        at_least=1,
        at_most=MAX_STEPS,
    )
    warmup: int | None = setting(
        "adaptive: steps before the first pass. null: as many as interval.",
        None,
        at_least=0,
        at_most=MAX_STEPS,
    )
    decay: float = setting(
        "adaptive: the share of a row's utility, the sum of the norms of its gradients, that is left after a pass.",
        0.5,
        at_least=0,
        at_most=1,
    )
    hysteresis: float = setting(
        "adaptive: a row keeps its width unless another row's utility is this share larger than its own.",
        0.2,
        at_least=0,
        at_most=1e6,
    )
    on_move: Literal["project", "reset"] = setting(
        "adaptive: project keeps the vector of a row that changes its width, as well as the new width can. reset makes "
        "rows that get narrower zero, as if they had been dropped.",
        "project",
    )
    tables: dict[str, TableCompressionConfig] = field(
        default_factory=dict,
        metadata={
            "meaning": "Limits on the widths of single tables, by name or pattern: min_width and max_width, both of "
            "the entry with the table's name, or else of the first pattern that matches. Write {C3: {min_width: "
            "16}}, or compression.tables.C3.min_width=16 on the command line. Ids of a table whose two limits are the "
            "same need not be sorted."
        },
    )

    def limits(self, table: str) -> TableCompressionConfig:
        """Return the limits on the widths of a table's rows."""
        return next(iter(matching_entries(self.tables, table)), TableCompressionConfig())

    def without_effect(self) -> dict[str, list[str]]:
        """Return the names of the settings that are not at their defaults and have no effect, by the setting why."""
        ignored = {
            "policy": {
                "none": [each.name for each in dataclasses.fields(self) if each.name not in ("policy", "preset")],
                "static": ["chunks", "interval", "warmup", "decay", "hysteresis", "on_move"],
                "adaptive": ["shared_rows"],
            }[self.policy]
        }
        if self.policy == "adaptive":  # chunks have one width, so that none gets narrower
            ignored["nested"] = ["chunks"] if self.nested else ["on_move"]
        defaults = CompressionConfig()
        return {
            why: [name for name in names if getattr(self, name) != getattr(defaults, name)]
            for why, names in ignored.items()
        }
