"""Tune and run the arms of ``compression_arms.py`` at equal bytes, and print how they differ from the single layer.

    .venv/bin/python benchmarks/compression_grid.py --data data/criteo --out criteo.jsonl
    .venv/bin/python benchmarks/compression_grid.py --drift --arms single whole graded --budgets 0.25 --out drift.jsonl

For each arm and budget:

1. The rate of rows is chosen on seed 0 among 0.02, 0.04 and 0.08, and where the best is the first or the last of them,
   0.01 or 0.16 too: the one with the smallest LogLoss on the validation split. With ``--tune-seeds`` the means over
   more seeds decide. The rates of dense layers and of W2 are the same for all arms.
2. Seeds 0 to ``--seeds`` - 1 run at this rate. Runs of one seed have the same initial dense layers and batches, so that
   differences are taken between runs of the same seed.

The test split decides nothing. Each run appends a line of JSON to ``--out``; a run that is there already is not
repeated, so that the same command resumes. A budget in which an arm cannot keep a row is noted as such.

With ``--drift`` the seed is the stream's, too, and arms that move rows start from the counts of the first tenth of the
training split. Static arms know the counts of all of it, or, where the name ends in ``_early``, of the first tenth.

Runs train one after another in one process with one thread; 4 to 8 seconds each on the Criteo sample.
"""

import argparse
import functools
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_arms import clicks_of, parser, train
from compression_data import Clicks
from compression_results import chosen_rates, key_of, read, served_table, training_table

RATES = (0.02, 0.04, 0.08)
BEYOND = (0.01, 0.16)
BUDGETS = (0.5, 0.25, 0.1, 0.05)
HASHED_SHARE = 0.3  # of the bytes that hot rows and hashed rows have together, as CAFE's
DRIFT = "--interval 50 --decay 0.95"
SHARED = "--shared-rows -1"
CHUNK_BYTES = 21  # a row with 8 chunks: 8 utilities in half precision, a bit for each, and where they are stored


@dataclass(frozen=True)
class Arm:
    """A way of making tables smaller.

    Attributes:
        label: what tables and figures call it.
        options: its command line for ``compression_arms.py``.
        sized: whether it can be made for any budget; else its widths say its size.
    """

    label: str
    options: str
    sized: bool = True


ARMS = {
    "single": Arm("single layer, d = 16", "", False),
    "d8": Arm("single layer, d = 8", "--embedding-dim 8 --widths 8", False),
    "d4": Arm("single layer, d = 4", "--embedding-dim 4 --widths 4", False),
    "mlet16": Arm("MLET k = 16", "--factorised", False),
    "mlet32": Arm("MLET k = 32", "--widths 32", False),
    "mlet64": Arm("MLET k = 64", "--widths 64", False),
    "mlet128": Arm("MLET k = 128", "--widths 128", False),
    "whole": Arm("static whole rows", "--policy static"),
    "whole_shared": Arm("static whole rows + shared row", f"--policy static {SHARED}"),
    "graded": Arm("static 16, 8, 4", "--policy static --widths 16 8 4"),
    "graded_shared": Arm("static 16, 8, 4 + shared row", f"--policy static --widths 16 8 4 {SHARED}"),
    "mlet_graded": Arm("static MLET 64 to 4", "--policy static --widths 64 32 16 8 4"),
    "mlet_shared": Arm("static MLET 64 to 4 + shared row", f"--policy static --widths 64 32 16 8 4 {SHARED}"),
    "d8_shared": Arm("static d = 8: 8, 4 + shared row", f"--policy static --embedding-dim 8 --widths 8 4 {SHARED}"),
    "d4_shared": Arm("static d = 4: 4 + shared row", f"--policy static --embedding-dim 4 --widths 4 {SHARED}"),
    "random": Arm("random 16, 8, 4", "--policy random --widths 16 8 4"),
    "project": Arm("adaptive 16, 8, 4, project", "--policy adaptive --widths 16 8 4"),
    "reset": Arm("adaptive 16, 8, 4, reset", "--policy adaptive --widths 16 8 4 --moved reset_on_shrink"),
    "mlet_project": Arm("adaptive MLET 64 to 4, project", "--policy adaptive --widths 64 32 16 8 4"),
    "adaptive_shared": Arm(
        "adaptive 16, 8, 4 by count + shared row", f"--policy adaptive --widths 16 8 4 --utility count {SHARED}"
    ),
    "chunks": Arm("chunks of d = 16 (FIITED)", f"--policy chunks --bookkeeping {CHUNK_BYTES}"),
    "mlet_chunks": Arm("chunks of k = 64 (FIITED)", f"--policy chunks --widths 64 --bookkeeping {CHUNK_BYTES}"),
    "count_gradient": Arm("adaptive whole rows by count × gradient", "--policy adaptive --utility count_gradient"),
    "hot_hashed": Arm("adaptive whole rows + hashed rows", "--policy adaptive --shared-rows HASHED"),
    "whole_hashed": Arm("static whole rows + hashed rows", "--policy static --shared-rows HASHED"),
    "whole_early": Arm("static whole rows, first tenth", "--policy static --start early"),
    "graded_early": Arm("static 16, 8, 4, first tenth", "--policy static --widths 16 8 4 --start early"),
    "graded_shared_early": Arm(
        "static 16, 8, 4 + shared row, first tenth", f"--policy static --widths 16 8 4 --start early {SHARED}"
    ),
    "mlet_shared_early": Arm(
        "static MLET 64 to 4 + shared row, first tenth",
        f"--policy static --widths 64 32 16 8 4 --start early {SHARED}",
    ),
}
"""By name, all arms."""

DEFAULT_ARMS = [name for name in ARMS if not name.endswith("_early")]


class Runs:
    """The runs of one data set, in a file of JSON lines.

    Args:
        path: the file; runs that it has are not repeated.
        common: options of all runs: the data set, and the size of the MLPs.
        clicks: the data set of a seed.
        deadline: the time of ``time.monotonic`` after which no run starts.
    """

    def __init__(self, path: Path, common: str, clicks: Callable[[int], Clicks], deadline: float) -> None:
        self.path, self.common, self.clicks, self.deadline = path, common, clicks, deadline
        self.found = {key_of(record): record for record in read(path)}

    def run(self, arm: str, budget: float | None, rate: float, seed: int) -> dict[str, Any]:
        """Return the record of a run, from the file if it is there."""
        key = (arm, budget, rate, seed)
        if key not in self.found:
            if time.monotonic() > self.deadline:
                raise TimeoutError
            clicks = self.clicks(seed)
            options = f"{self.common} {ARMS[arm].options} --rate {rate} --seed {seed} --serve"
            options += f" --budget {budget}" if budget else ""
            if "--drift-rows" in options:
                options += f" --drift {seed}" + " --start early" * ("adaptive" in options or "chunks" in options)
            options += " --prune 0.5 0.35 0.25 0.15 0.1 0.05 0.025" if arm == "single" else ""
            options = options.replace("HASHED", str(_hashed_rows(clicks, options, budget or 1.0)))
            record = {"arm": arm, "budget": budget, "rate": rate, "seed": seed, "options": options}
            try:
                record |= _short(train(parser().parse_args(shlex.split(options)), clicks))
            except ValueError as error:
                record["error"] = str(error)
            self.found[key] = record
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{arm} {budget} {rate} {seed}: {record.get('test_logloss', record.get('error'))}", flush=True)
        return self.found[key]

    def tuned(self, arm: str, budget: float | None, tune_seeds: int, seeds: int) -> None:
        """Choose the rate of an arm on the first ``tune_seeds`` seeds and run all seeds with it."""
        if "error" in self.run(arm, budget, RATES[0], 0):
            return
        rates = RATES
        for seed in range(tune_seeds):
            for rate in rates:
                self.run(arm, budget, rate, seed)
            best = chosen_rates(self.found.values())[arm, budget]
            if best in (RATES[0], RATES[-1]) and BEYOND[best == RATES[-1]] not in rates:
                rates = (*rates, BEYOND[best == RATES[-1]])
                for tried in range(seed + 1):
                    self.run(arm, budget, rates[-1], tried)
        rate = chosen_rates(self.found.values())[arm, budget]
        for seed in range(seeds):
            self.run(arm, budget, rate, seed)


def _hashed_rows(clicks: Clicks, options: str, budget: float) -> int:
    rows = sum(clicks.sizes)
    return max(1, int(HASHED_SHARE * rows * (budget - 6 / 128 * ("adaptive" in options))))


def _short(result: dict[str, Any]) -> dict[str, Any]:
    served = {
        "/".join(str(each[name]) for name in ("form", "kept", "bits") if name in each): [
            each["bytes"],
            round(each["auc"], 6),
            round(each["logloss"], 6),
        ]
        for each in result["served"]
    }
    shares = {
        name: {width: round(share, 5) for width, share in result[name].items()}
        for name in ("rows_by_width", "lookups_by_width")
    }
    numbers = {
        name: result[name] and round(result[name], 6)
        for name in ("test_auc", "test_logloss", "valid_logloss", "ceiling", "training_share")
    }
    rest = {"moved": sum(result["moved"]), "seconds": round(result["seconds"], 1)}
    return {**numbers, "training_bytes": result["training_bytes"], **shares, **rest, "served": served}


def main() -> None:
    """Run what the command line asks for, and print the tables."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--data", type=Path, help="directory of a prepared data set")
    add("--drift", action="store_true", help="instead of --data: streams in which popularity drifts")
    add("--drift-rows", type=int, default=200_000, help="length of such a stream (default: 200000)")
    add("--cache", type=Path, default=Path("data/cache"), help="where arrays are kept (default: data/cache)")
    add("--out", type=Path, required=True, help="file of JSON lines, one for each run")
    add("--arms", nargs="*", default=DEFAULT_ARMS, choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}")
    add("--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the single layer's bytes in training")
    add("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    add("--tune-seeds", type=int, default=1, help="number of seeds on which rates are compared (default: 1)")
    add("--mlp-divisor", type=int, default=4, help="divides the sizes of the MLPs' hidden layers (default: 4)")
    add("--minutes", type=float, default=float("inf"), help="start no run after this time")
    args = found.parse_args()
    if (args.data is None) != args.drift:
        found.error("give --data or --drift")
    common = f"--mlp-divisor {args.mlp_divisor} "
    common += f"--drift-rows {args.drift_rows} {DRIFT}" if args.drift else f"--data {args.data} --cache {args.cache}"

    @functools.lru_cache(maxsize=args.seeds)
    def clicks(seed: int) -> Clicks:
        return clicks_of(parser().parse_args(shlex.split(common + (f" --drift {seed}" if args.drift else ""))))

    runs = Runs(
        args.out, common, (lambda seed: clicks(seed if args.drift else 0)), time.monotonic() + 60 * args.minutes
    )
    try:
        for arm in args.arms:
            for budget in args.budgets if ARMS[arm].sized else [None]:
                runs.tuned(arm, budget, args.tune_seeds, args.seeds)
    except TimeoutError:
        print("no time is left; the same command resumes")
    records, labels = list(runs.found.values()), {name: arm.label for name, arm in ARMS.items()}
    for metric in ("test_logloss", "test_auc"):
        print(f"\n{training_table(records, labels, metric)}")
    print(f"\n{served_table(records, labels)}")


if __name__ == "__main__":
    main()
