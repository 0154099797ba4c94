"""`mlet plan`."""

import argparse
from pathlib import Path

from mlet_dist.cli.options import add_settings, positive, warn
from mlet_dist.cli.output import Result, write
from mlet_dist.cli.process import before_torch
from mlet_dist.config.config_file import load_config
from mlet_dist.errors import UserError

TEXT = "Memory, bytes sent and step time of a run, for hardware that need not be here."
EPILOG = """\
No GPU, no data set and no other process are needed. An example, with table sizes from a file:

  mlet plan configs/criteo_kaggle_adagrad.yaml --tables tables.yaml --world-size 64 --device h100 \\
      model.hidden_dim=256 model.embedding_dim=32 data.batch_size=65536 --out plan.html

  # tables.yaml: rows of each table, or also the ids that a bag holds on average (1 where it is not said)
  C1: 45000000
  C2: {num_embeddings: 36000000, pooling_factor: 20}

It prints why tables lie where they do, what each rank holds (rows, their optimizer's state, a step's buffers, and W2
and the dense layers, which every rank holds), and the same tables in several ways: single layers of d and of k columns,
MLET with the projection after the exchange, and MLET as configured. Times are at the hardware's peak rates
(mlet_dist/planner/hardware.yaml), without launches and waiting: for comparison, and a lower bound. Where the tables do
not fit, the exit code is 2 and one line says what is missing and what would fit; --out draws the plan then, too.
Settings are those of `mlet train --help`."""

_MOST_LOCAL_RANKS = 128  # torch.device keeps an index in 8 bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    add_settings(parser)
    parser.add_argument("--world-size", type=positive, required=True, metavar="N", help="ranks, one a device")
    parser.add_argument(
        "--local-world-size",
        type=positive,
        metavar="N",
        help="ranks of a node (default 8, or all where they are fewer)",
    )
    parser.add_argument(
        "--device", default="h100", metavar="NAME",
        help="a100-40, a100-80, h100, h200, b200, cpu, or a YAML file with one of your own (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tables", metavar="FILE", help="YAML file of table sizes; else those of the data set at data.path are taken"
    )
    parser.add_argument("--out", metavar="PLAN.html", help="also write a picture of the memory by rank")


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    from mlet_dist.planner.plan_inputs import load_hardware, load_tables

    if args.out is not None and Path(args.out).suffix not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: the picture is a page; name a file that ends in .html")
    config = load_config(Path(args.config), args.overrides)
    hardware = load_hardware(args.device)
    args.local_world_size = args.local_world_size or min(8, args.world_size)
    if args.local_world_size > _MOST_LOCAL_RANKS:
        raise UserError(
            f"--local-world-size {args.local_world_size}: torch counts up to {_MOST_LOCAL_RANKS} devices of a node"
        )
    if args.world_size % args.local_world_size:
        whole = -(-args.world_size // args.local_world_size) * args.local_world_size
        raise UserError(
            f"--world-size {args.world_size} is not a multiple of --local-world-size {args.local_world_size}: every "
            f"node holds as many ranks; use --world-size {whole}, or --local-world-size "
            f"{next(each for each in range(args.local_world_size, 0, -1) if not args.world_size % each)}"
        )
    config.check_world_size(args.world_size)
    config.check_device(hardware["kind"])
    spec, pooling_factors = load_tables(config, None if args.tables is None else Path(args.tables))
    warn(config)
    before_torch()
    from mlet_dist.embeddings.planning.cost_model import Device
    from mlet_dist.planner.plan_report import picture, report
    from mlet_dist.planner.run_plan import make_plan

    plan = make_plan(config, spec, pooling_factors, Device(**hardware), args.world_size, args.local_world_size)
    if args.out is not None:
        try:
            Path(args.out).write_text(picture(plan), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from None
    if plan["shortage"] is not None:
        raise UserError(plan["shortage"])
    if not args.json:
        write(report(plan))
        return None, True
    return plan, True
