"""Compares the memory of a rank that `mlet plan` predicts with what training takes, for each network, on CPU ranks.

    .venv/bin/python benchmarks/plan_memory.py --data DATA            # the last line is JSON
    .venv/bin/python benchmarks/plan_memory.py --data DATA --networks dlrm deepfm --ranks 2

DATA is a data set of `mlet prepare`. What training takes is the peak of a rank's resident memory over some steps, less
what it was before the model was built, which is that of Python and the libraries. It contains what a plan does not
count on CPUs: the batches that are read ahead, and holes between blocks of the allocator.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlet_dist.cli.process import configure_torch

ROOT = Path(__file__).parents[1]
NETWORKS: dict[str, list[str]] = {
    "dlrm": [],
    "dlrm_dcn": ["model.name=dlrm_dcn"],
    "deepfm": ["model.name=deepfm"],
    "two_tower": ["model.name=two_tower", "model.query_features=[C1,C2,C3]"],
    "builder": ["model.builder=own_network:build", "model.arguments.hidden=512"],
}
_BEFORE = "resident before the model"


def settings_of(network: str, args: argparse.Namespace, run: Path) -> list[str]:
    """Return the settings of a run as on the command line."""
    return [
        *NETWORKS[network], f"data.path={args.data}", f"run.dir={run}", f"model.hidden_dim={args.hidden_dim}",
        f"data.batch_size={args.batch * args.ranks}", "optimizer.name=adagrad", "optimizer.learning_rate=0.01",
        "train.checkpoint_async=false", f"train.max_steps={args.steps}", "train.log_every=1",
    ]  # fmt: skip


def train(arguments: list[str]) -> None:
    """Train as one rank, and print its resident memory before that."""
    configure_torch()
    from mlet_dist.config.config_file import load_config
    from mlet_dist.training.trainer import train

    config = load_config(Path(arguments[0]), arguments[1:])
    print(json.dumps({_BEFORE: _resident_bytes()}), flush=True)
    train(config)


def measure(network: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return predicted and measured bytes of the rank that takes most."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        settings = settings_of(network, args, run)
        config = str(ROOT / "configs" / "criteo_kaggle.yaml")
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'docs'}", "OMP_NUM_THREADS": "1"}
        ranks = ["--world-size", str(args.ranks), "--local-world-size", str(args.ranks), "--device", "cpu", "--json"]
        planned = _output([sys.executable, "-m", "mlet_dist", "plan", config, *settings, *ranks], environment)
        command = [sys.executable, str(Path(__file__)), "--train", config, *settings]
        if args.ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
            command = [sys.executable, *launcher, *command[1:]]
        before = [json.loads(line)[_BEFORE] for line in _output(command, environment).splitlines() if _BEFORE in line]
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    peaks = [record["rank_peak_memory_bytes"] for record in records if record["split"] == "timing"][-1]
    taken = max(peaks) - min(before)
    predicted = max(each["total"] for each in json.loads(planned.splitlines()[-1])["ranks"])
    return {
        "network": network, "ranks": args.ranks, "local_batch_size": args.batch, "predicted_bytes": int(predicted),
        "measured_bytes": taken, "predicted_over_measured": predicted / taken,
    }  # fmt: skip


def _output(command: list[str], environment: dict[str, str]) -> str:

    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _resident_bytes() -> int:
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def show(result: dict[str, Any]) -> None:
    """Print one case as a line."""
    predicted, measured = (result[f"{name}_bytes"] / 1e6 for name in ("predicted", "measured"))
    print(
        f"{result['network']:10} {result['ranks']} ranks: predicted {predicted:,.0f} MB, measured {measured:,.0f} MB, "
        f"ratio {result['predicted_over_measured']:.2f}",
        flush=True,
    )


def main() -> None:
    """Train each network in processes of its own."""
    if sys.argv[1:2] == ["--train"]:
        return train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data set of `mlet prepare` (default: one of 2,000 made rows)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8192, help="rows on each rank")
    parser.add_argument("--hidden-dim", type=int, default=1024, help="k (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as directory:
        if args.data is None:
            args.data = f"{directory}/data"
            _output([sys.executable, "-m", "mlet_dist", "synth", "--out", args.data, "--rows", "2000"], {})
        for network in args.networks:
            found.append(measure(network, args))
            show(found[-1])
    print(json.dumps({"cases": found}))


if __name__ == "__main__":
    main()
