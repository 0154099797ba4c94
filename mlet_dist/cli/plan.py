"""`mlet plan`."""

import argparse
from pathlib import Path

from mlet_dist.atomic_file import replaced_file
from mlet_dist.cli.options import add_settings, positive, print_warnings, up_to
from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import configure_torch
from mlet_dist.config.config_file import load_config
from mlet_dist.errors import UserError

TEXT = "Plan the sharding of a run and estimate its memory, traffic and step time on any hardware."
EPILOG = """\
The command needs no GPU, no data set and no other process. An example with table sizes from a file:

  mlet plan configs/criteo_kaggle_adagrad.yaml --tables tables.yaml --world-size 64 --device h100 \\
      model.hidden_dim=256 model.embedding_dim=32 data.batch_size=65536 --out plan.html

  # tables.yaml: the rows of each table, and optionally its pooling factor (mean ids of a bag; default 1)
  C1: 45000000
  C2: {num_embeddings: 36000000, pooling_factor: 20}

It prints the sharding plan with its reasons; the memory of each rank (rows, their optimizer state, the buffers of a
step, and W2 and the dense layers, which are on every rank); and, for comparison, the cost of a step for single layers
of d and of k columns, for MLET with W2 after the exchange, and for MLET as configured. The time of a step is the sum of
the latency of collectives, bytes on the network, bytes of memory, matrix products, the host's own work, and the skew of
the ids. By default it assumes the hardware's peak rates (mlet_dist/planner/hardware.yaml) and estimated latencies; with
--calibration the rates are those of your own cluster. With compression, which needs the data set, it also shows what
the budget and others keep.

If the tables do not fit, the exit code is 2, and one line says how much memory is missing and suggests
settings that fit; the page of --out is written all the same. `mlet train --help` lists the settings."""

_MAX_RANKS = 1 << 17
_MAX_LOCAL_RANKS = 128  # torch.device stores the index of a device in 8 bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_settings(parser)
    parser.add_argument(
        "--world-size", type=up_to(_MAX_RANKS), required=True, metavar="N", help="number of ranks, one for each device"
    )
    parser.add_argument(
        "--local-world-size",
        type=positive,
        metavar="N",
        help="ranks on each node (default: 8, or all ranks if there are fewer)",
    )
    parser.add_argument(
        "--device", default="h100", metavar="NAME",
        help="a100-40, a100-80, h100, h200, b200, cpu, or a YAML file that describes a device as "
        "mlet_dist/planner/hardware.yaml does (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tables", metavar="FILE", help="YAML file of table sizes (default: the sizes of the data set at data.path)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="rates that `mlet doctor --distributed --calibrate FILE` measured, in place of those of --device, whose "
        "memory stays",
    )  # fmt: skip
    parser.add_argument("--out", metavar="PLAN.html", help="also write a page with a chart of the memory of each rank")


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    from mlet_dist.config.calibration_file import load_calibration
    from mlet_dist.planner.plan_inputs import load_hardware, load_lookups, load_tables

    if args.out is not None and Path(args.out).suffix not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: the plan is written as an HTML page; name a file that ends in .html")
    config = load_config(Path(args.config), args.overrides)
    hardware = load_hardware(args.device)
    calibration = None if args.calibration is None else load_calibration(Path(args.calibration))
    if calibration is not None and calibration.device != hardware["kind"]:
        raise UserError(
            f"--calibration {args.calibration}: it was measured on {calibration.device} ranks, and --device "
            f"{args.device} is of kind {hardware['kind']}; name a device of kind {calibration.device}"
        )
    args.local_world_size = args.local_world_size or min(8, args.world_size)
    if args.local_world_size > _MAX_LOCAL_RANKS:
        raise UserError(
            f"--local-world-size {args.local_world_size}: torch supports at most {_MAX_LOCAL_RANKS} devices on a node"
        )
    if args.world_size % args.local_world_size:
        next_multiple = -(-args.world_size // args.local_world_size) * args.local_world_size
        raise UserError(
            f"--world-size {args.world_size} is not a multiple of --local-world-size {args.local_world_size}: every "
            f"node must have the same number of ranks; use --world-size {next_multiple}, or --local-world-size "
            f"{next(each for each in range(args.local_world_size, 0, -1) if not args.world_size % each)}"
        )
    config.check_world_size(args.world_size)
    config.check_device(hardware["kind"])
    spec, pooling_factors = load_tables(config, None if args.tables is None else Path(args.tables))
    print_warnings(config)
    configure_torch()
    from mlet_dist.planner.hardware_rates import build_device, precision_of, rate_sources
    from mlet_dist.planner.plan_page import html_page
    from mlet_dist.planner.plan_report import text_report
    from mlet_dist.planner.run_plan import make_plan

    lookups = load_lookups(config, spec) if args.tables is None and config.compression.policy == "none" else {}
    device = build_device(hardware, precision_of(config), calibration)
    plan = make_plan(config, spec, pooling_factors, device, args.world_size, args.local_world_size, lookups)
    nodes = args.world_size // args.local_world_size
    plan["rates"] = rate_sources(hardware, calibration, args.world_size, nodes)
    if args.out is not None:
        _write(Path(args.out), html_page(plan))
    if plan["shortage"] is not None:
        raise UserError(plan["shortage"])
    if not args.json:
        print_text(text_report(plan))
        return None, True
    return plan, True


def _write(out: Path, page: str) -> None:
    """Write the page; an earlier one stays if this fails."""
    try:
        with replaced_file(out) as file:
            file.write(page.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
