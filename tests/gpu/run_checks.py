"""Check mlet_dist on the GPUs of this machine, or rehearse the checks on its CPU, and write a dated result.

    make gpu                                      # all checks on all GPUs, in about ten minutes
    python -m tests.gpu.run_checks --ranks 1      # on one GPU; any Python with torch, TorchRec and fbgemm will do
    python -m tests.gpu.run_checks --device cpu   # the rehearsal: gloo in the place of NCCL

Every check prints a line, and the result is written anew after each, so that an interrupted run leaves one, too. The
exit code is 1 if a check failed.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

from tests.gpu import exactness, fused_kernels, step_times, training_runs
from tests.gpu.check_report import Outcome, write
from tests.gpu.machine import Machine, NotHere, description
from tests.helpers.mlet_command import ROOT

Check = Callable[[Machine], str]

CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        exactness.collectives,
        exactness.every_exchange_and_optimizer,
        exactness.every_sharding_type,
        exactness.every_precision,
        training_runs.pipelined_is_plain,
        training_runs.resumed_is_uninterrupted,
        exactness.host_memory_kernels,
        exactness.half_precision_rows,
        exactness.stochastic_rounding,
        exactness.rounded_exchange,
        fused_kernels.fused_adam_is_lazy_adam,
        fused_kernels.steps_without_host_copies,
        training_runs.precision_of_dense_layers,
        training_runs.killed_rank,
        training_runs.stopped_rank,
        training_runs.same_weights_on_all_numbers_of_ranks,
        step_times.step_benchmark,
        training_runs.compiled_dense_layers,
    )
}
"""By name, in the order in which they run; the docstring says what a check checks, and its result what it found."""


def main(arguments: Sequence[str] | None = None, checks: Mapping[str, Check] = CHECKS) -> int:
    """Run the checks; return 1 if one of them failed, 2 if there is no GPU, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal (default: cuda)")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (default: 1, 2 and one for each GPU)")
    parser.add_argument("--only", nargs="+", choices=tuple(checks), metavar="CHECK", help=", ".join(checks))
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds; later checks do not begin")
    parser.add_argument("--out", type=Path, help="path of the result, .md and .json; cpu writes none without it")
    given = parser.parse_args(arguments)
    sizes = _world_sizes(given.device, given.ranks)
    if sizes is None:
        return 2
    about = {"date": date.today().isoformat(), "device": given.device, "ranks": sizes, **description(given.device)}
    out = given.out
    if out is None and given.device == "cuda":
        name = about["gpus"][0].lower().replace(" ", "-")
        out = ROOT / "benchmarks" / "results" / f"{about['date']}-gpu-{name}"
    started, outcomes = time.monotonic(), []
    with Machine(given.device, sizes) as machine:
        for name in given.only or checks:
            left = given.time_limit - (time.monotonic() - started)
            outcome = _run(name, checks[name], machine) if left > 0 else Outcome(name, "skipped", "no time was left")
            print(f"{outcome.result:8} {outcome.seconds:6.1f} s  {name}: {outcome.first_line}", flush=True)
            outcomes.append(outcome)
            if out is not None:
                write(out, about, outcomes)
    failed = [each.name for each in outcomes if each.result == "failed"]
    print(f"{len(outcomes)} checks, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    if out is not None:
        print(f"written: {out}.md and {out}.json")
    return 1 if failed else 0


def _world_sizes(device: str, wanted: Sequence[int] | None) -> list[int] | None:
    """Return the numbers of ranks to check, or None after a message if this machine cannot have them."""
    if device == "cpu":
        return sorted(set(wanted or (1, 2)))
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus or max(wanted or (1,)) > gpus:
        print(
            f"run_checks: torch {torch.__version__} finds {gpus} GPUs here"
            + (f", and --ranks {max(wanted)} needs as many" if wanted and gpus else "")
            + "; rehearse on the CPU by --device cpu",
            file=sys.stderr,
        )
        return None
    return sorted(set(wanted or (1, min(2, gpus), gpus)))


def _run(name: str, check: Check, machine: Machine) -> Outcome:
    started = time.monotonic()
    try:
        result, text = "passed", check(machine)
    except NotHere as reason:
        result, text = "skipped", str(reason)
    except Exception as error:
        result, text = "failed", f"{error}\n{traceback.format_exc()}".strip()
    return Outcome(name, result, text, time.monotonic() - started, (check.__doc__ or "").strip())


if __name__ == "__main__":
    sys.exit(main())
