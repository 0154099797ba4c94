"""Several sizes of one run: nested training, cut tables and budgets, against runs of their own.

    .venv/bin/python benchmarks/sizes.py --data data/criteo --out data/sizes               # quality, 40 runs
    .venv/bin/python benchmarks/sizes.py --data data/criteo --out data/sizes --times       # seconds of a step alone

Runs are those of `mlet train configs/criteo_kaggle_adagrad.yaml`, with d = 16, for single-layer tables (rows' rate
0.04) and for MLET (k = 64, rate 0.01). For each seed it trains runs of their own at 4, 8 and 16 columns, and nested
runs with ``model.nested_loss`` all and sampled. Then it cuts the tables of the run of 16 columns as `mlet export
--dims` does, and finds tables within budgets as `mlet export --budget` does, by the validation split. A run that is in
``--out`` already is not repeated. What is printed is the LogLoss of the test split: mean ± standard deviation over the
seeds.

Without ``--data`` the runs are those of a few rows of `mlet synth`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from mlet_dist.cli.process import configure_torch
from mlet_dist.data.location import data_set_path
from mlet_dist.export.budget.run_budget import choose
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.measured_split import MeasuredSplit, served_vectors
from mlet_dist.export.size_choice import counts_of, size_of
from mlet_dist.export.sized_model import at_size
from mlet_dist.export.source import ModelSource

ROOT = Path(__file__).parents[1]
LAYERS = {
    "single": ["model.hidden_dim=null", "optimizer.rows_learning_rate=0.04"],
    "mlet": ["model.hidden_dim=64", "optimizer.rows_learning_rate=0.01"],
}
D, DIMS = 16, (4, 8)
WAYS = {
    **{f"own{dim}": [f"model.embedding_dim={dim}"] for dim in (D, *DIMS)},
    "all": [f"model.nested_dims={list(DIMS)}"],
    "sampled": [f"model.nested_dims={list(DIMS)}", "model.nested_loss=sampled"],
}
LABELS = {
    "own": "runs of their own",
    "all": "nested, all",
    "sampled": "nested, sampled",
    "cut": "cut after training",
}


def train(args: argparse.Namespace, layers: str, way: str, seed: int, *more: str) -> dict[str, Any]:
    """Return the summary of a run, which is trained unless it is there."""
    run = args.out / f"{layers}-{way}-{seed}"
    if not (run / "summary.json").exists():
        settings = [*LAYERS[layers], *WAYS[way], *args.settings, *more, f"train.seed={seed}"]
        command = [sys.executable, "-m", "mlet_dist", "train", ROOT / "configs" / "criteo_kaggle_adagrad.yaml"]
        settings += [f"data.path={args.data}", f"run.dir={run}", "run.overwrite=true"]
        subprocess.run([*map(str, command), *settings], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def cut_losses(run: Path, data: Path, budgets: list[str]) -> dict[tuple[str, str], float]:
    """Return the LogLoss of the test split with the tables of a run cut to DIMS, and within budgets."""
    location = data_set_path(str(data))
    with ModelSource.open(run) as source:
        split = MeasuredSplit(source, location, "test")
        vectors, model = split.read(source), split.model(source)
        found = {}
        for dim in DIMS:
            size = size_of(source, dim, "truncated", counts_of(source, str(data)))
            served = {
                name: served_vectors(split.ids[name], each, size.tables[name], ENCODINGS["fp32"])
                for name, each in vectors.items()
            }
            found["cut", str(dim)] = model.logloss(served)
        for budget in budgets:
            (output, size), result = choose(source, budget, str(data))
            encoding = ENCODINGS["fp32" if output.startswith("dcp") else output.partition("-")[0]]
            sized = source if size is None else at_size(source, size)
            tables = {} if size is None else size.tables
            served = {
                name: served_vectors(split.ids[name], each, tables.get(name), encoding)
                for name, each in split.read(source).items()
            }
            assert sized.spec.embedding_dims == source.spec.embedding_dims
            found[budget, output] = split.model(source).logloss(served)
            found[budget, "valid"] = result["chosen"]["change"]
        found["float32", ""] = model.logloss(vectors)
    return found


def quality(args: argparse.Namespace) -> None:
    """Train, and print the LogLoss of each way to each size."""
    for layers in args.layers:
        of_way: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        of_budget: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
        for seed in range(args.seeds):
            for way in WAYS:
                summary = train(args, layers, way, seed)
                if way.startswith("own"):
                    of_way["own"][int(way.removeprefix("own"))].append(summary["test_logloss"])
                    continue
                of_way[way][D].append(summary["test_logloss"])
                for dim in DIMS:
                    of_way[way][dim].append(summary[f"test_logloss_dim{dim}"])
            found = cut_losses(args.out / f"{layers}-own{D}-{seed}", args.data, args.budgets)
            for dim in DIMS:
                of_way["cut"][dim].append(found["cut", str(dim)])
            of_way["cut"][D].append(found["float32", ""])
            for budget in args.budgets:
                (output,) = (each for of, each in found if of == budget and each != "valid")
                change = found[budget, output] - found["float32", ""]
                of_budget[budget].append((output, found[budget, "valid"], change))
        print(f"\n| {layers}, {args.seeds} seeds | d = 4 | d = 8 | d = 16 |\n|---|--:|--:|--:|")
        for way, label in LABELS.items():
            print(f"| {label} | {' | '.join(_spread(of_way[way][dim]) for dim in (*DIMS, D))} |")
        if args.budgets:
            print("\n| budget | chosen | change on valid | change on test |\n|---|---|--:|--:|")
        for budget, each in of_budget.items():
            outputs, valid, test = zip(*each, strict=True)
            print(f"| {budget} | {', '.join(sorted(set(outputs)))} | {_spread(valid, '+')} | {_spread(test, '+')} |")


def times(args: argparse.Namespace) -> None:
    """Print the milliseconds of a step of each way: the least of the means of 50 steps, over rounds that take turns."""
    print(f"\n| {args.rounds} rounds | {' | '.join(WAYS)} |\n|---|{'--:|' * len(WAYS)}")
    for layers in args.layers:
        least = dict.fromkeys(WAYS, float("inf"))
        for number in range(args.rounds):
            for way in WAYS:
                run = args.out / f"{layers}-{way}-{100 + number}"
                train(args, layers, way, 100 + number, f"train.max_steps={args.steps}", "train.log_every=50")
                records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                steps = [record["step_ms"] for record in records if record["split"] == "timing"]
                least[way] = min(least[way], *(steps[1:] or steps))  # the first has warm-up in it
        print(f"| {layers} | {' | '.join(f'{least[way]:.2f}' for way in WAYS)} |")


def _spread(values: Any, sign: str = "") -> str:
    deviation = f"{statistics.stdev(values):.5f}" if len(values) > 1 else "–"
    return f"{statistics.fmean(values):{sign}.5f} ± {deviation}"


def main() -> None:
    """Run what the command line asks for, and print the tables."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--data", type=Path, help="directory of a prepared data set")
    add("--out", type=Path, help="directory of the runs; a temporary one if it is not given")
    add("--layers", nargs="+", default=list(LAYERS), choices=LAYERS, help="(default: both)")
    add("--seeds", type=int, default=4, help="(default: 4)")
    add("--budgets", nargs="*", default=["6x", "12x", "32x", "64x"], help="(default: 6x 12x 32x 64x)")
    add("--settings", nargs="*", default=[], help="more settings of all runs")
    add("--times", action="store_true", help="measure the time of a step instead")
    add("--rounds", type=int, default=3, help="of --times (default: 3)")
    add("--steps", type=int, default=400, help="of a run of --times (default: 400)")
    args = found.parse_args()
    configure_torch()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        args.out = (args.out or Path(folder) / "runs").absolute()
        if args.data is None:
            args.data = Path(folder) / "data"
            synth = ["synth", "--out", str(args.data), "--rows", "1500", "--num-embeddings", "60"]
            subprocess.run([sys.executable, "-m", "mlet_dist", *synth], check=True, stdout=subprocess.DEVNULL)
        args.data = args.data.absolute()
        args.out.mkdir(parents=True, exist_ok=True)
        (times if args.times else quality)(args)


if __name__ == "__main__":
    main()
