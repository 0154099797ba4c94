"""Compute how evenly the lookups of row_wise tables under unique_rows are spread over ranks.

    python -m benchmarks.owners --data data/criteo

A rank requests each distinct id of its batch once from the id's owner. For tables whose ids are drawn independently,
the expected number of requests of an owner follows from how often each id occurs, so nothing is trained here. The
figures are the busiest owner's requests over the mean of all owners:

- before: rows stored by id, and the first blocks of the tables on different ranks;
- after: rows stored in the order of ``mlet_dist.embeddings.row_order``.

One id of one table cannot be shared: its owner is asked for it by every rank. ``least`` is the ratio that this alone
forces, where it is above 1.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.embeddings.row_order import RowOrder, busiest_over_mean, expected_requests, requests_of_owners
from mlet_dist.embeddings.sharded.placement import max_rows_per_rank

RANKS = (2, 8, 64, 1024)
# Rows of Criteo-1TB's tables with ids below 40 million, as in MLPerf's DLRM.
CRITEO_1TB = (
    *(40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209),
    *(11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
)
GIANT = (40_000_000,)
HIDDEN_DIM = 64


def zipf(rows: int, exponent: float) -> torch.Tensor:
    """Return the probability of each id ``(rows,)`` float64, proportional to (id + 1)^-exponent."""
    weights = torch.arange(1, rows + 1, dtype=torch.float64).pow_(-exponent)
    return weights / weights.sum()


def measure(shares: Sequence[torch.Tensor], batch_size: int, ranks: int) -> dict[str, float]:
    """Return busiest over mean ``before`` and ``after``, and the ``least`` that is possible.

    Args:
        shares: for each table, the probability of each id.
        batch_size: ids that a rank draws from each table.
        ranks: R. Tables that the sharder would replicate on so many GPUs are left out.
    """
    distinct = {id(each): expected_requests(each, batch_size) for each in _row_wise(shares, ranks)}
    tables = [distinct[id(each)] for each in shares if id(each) in distinct]
    found = {"tables": float(len(tables))}
    for name, spread in (("before", False), ("after", True)):
        by_block = {
            id(each): requests_of_owners(RowOrder((len(each),)) if spread else None, each, ranks)
            for each in distinct.values()
        }
        # As in stagger_blocks; before, the first blocks of few tables were further apart.
        step = 1 if spread else max(1, ranks // len(tables))
        by_rank = [by_block[id(each)].roll(index * step % ranks) for index, each in enumerate(tables)]
        found[name] = busiest_over_mean(by_rank)
    mean = sum(float(requests.sum()) for requests in tables) / ranks
    found["least"] = max(1.0, max(float(requests.max()) for requests in tables) / mean)
    return found


def _row_wise(shares: Sequence[torch.Tensor], ranks: int) -> list[torch.Tensor]:
    return [each for each in shares if max_rows_per_rank(len(each), HIDDEN_DIM, ranks, on_cpu=False) is not None]


def data_shares(data: Path) -> list[torch.Tensor]:
    """Return the share of each id in the training split of a prepared data set, table by table."""
    schema = DatasetSchema.load(data)
    names = dict.fromkeys(feature.table_name for feature in schema.sparse)
    counts = (torch.from_numpy(count_ids(data, schema, name)).double() for name in names)
    return [each / each.sum() for each in counts]


def main() -> None:
    """Print a table, and one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a prepared data set whose counts are used, too")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1024, 16_384], help="of one rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--largest", type=int, default=GIANT[0], help="most rows of a made table")
    args = parser.parse_args()
    cases: dict[str, Sequence[torch.Tensor]] = {}
    if args.data is not None:
        cases[f"counts of {args.data.name}"] = data_shares(args.data)
    found: list[Mapping[str, Any]] = []
    for name, sizes in (("Criteo-1TB", CRITEO_1TB), ("one table", GIANT)):
        for exponent in (1.05, 1.2):
            drawn = {size: zipf(min(size, args.largest), exponent) for size in set(sizes)}
            cases[f"{name}, Zipf {exponent}"] = [drawn[size] for size in sizes]
    print("| ids | batch of a rank | ranks | before | after | least possible |\n|---|--:|--:|--:|--:|--:|", flush=True)
    for name, shares in cases.items():
        for batch_size in args.batch_size:
            for ranks in args.ranks:
                if not _row_wise(shares, ranks):
                    print(f"| {name} | {batch_size:,} | {ranks:,} | all tables are replicated | | |")
                    continue
                each = measure(shares, batch_size, ranks)
                found.append({"ids": name, "batch_size": batch_size, "ranks": ranks, **each})
                figures = " | ".join(f"{each[key]:.2f}" for key in ("before", "after", "least"))
                print(f"| {name} | {batch_size:,} | {ranks:,} | {figures} |", flush=True)
    print(json.dumps({"cases": found}))


if __name__ == "__main__":
    main()
