"""The `mlet` command: parses, imports lazily and calls one function per subcommand."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlet_dist.config import Config, describe_settings, load_config
from mlet_dist.errors import Interrupted, RanksLost, UserError, one_line
from mlet_dist.json_text import to_json

Result = dict[str, Any]

_LAUNCHED = "MLET_LAUNCHED"
_PARENT = "MLET_PARENT"  # the process that this one must not outlive
_MOST_LOCAL_RANKS = 128  # torch.device keeps an index in 8 bits
_PREPARE_HELP = """\
  mlet prepare criteo train.txt --out data/criteo                  # Criteo-Kaggle
  mlet prepare criteo day_{0..23}.gz --split paper --out data/1tb  # Criteo-1TB
  mlet prepare avazu train.gz --out data/avazu
  mlet prepare table ratings.csv --schema configs/tables/movielens.yaml --out data/movielens
  mlet prepare --check data/criteo

The same command goes on from what an interrupted one has finished, which is kept in .NAME.prepare beside DIR. With
other arguments it takes what these do not change: another --max-malformed, --min-count or --split reads nothing again.
Several machines that share a file system do one pass after the other, with the same arguments everywhere:

  mlet prepare criteo day_*.gz --out data/1tb --pass read --shard I/N     # on machine I of N
  mlet prepare criteo day_*.gz --out data/1tb --pass count --shard I/N
  mlet prepare criteo day_*.gz --out data/1tb --pass vocabulary           # on one
  mlet prepare criteo day_*.gz --out data/1tb --pass write --shard I/N
  mlet prepare criteo day_*.gz --out data/1tb --pass merge                # on one

--memory bounds what the processes hold beside the vocabularies; it does not depend on the number of rows."""
_PLAN_HELP = """\
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    0 on success, 2 for a user's mistake, 75 for a run that was told to stop and is to be started again, 130 and 143
    when interrupted or terminated, else 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed by `2>&-`; print would take stdout in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        _die_with_parent()
        args = _parse(arguments)
        rank = _rank(args)
        if rank is None:
            signal.signal(signal.SIGTERM, _unwind)
        result, ok = args.command(args, arguments)
        if result is not None and not rank:
            _show(result, args.json)
        return 0 if ok else 1
    except UserError as error:
        if not _handed_to_launcher(error):
            _print_error(error)
        return 2
    except Interrupted as stopped:
        if not _handed_to_launcher(stopped):
            print(f"mlet: {stopped}", file=sys.stderr)
        return Interrupted.EXIT_CODE
    except RanksLost as error:
        if not _handed_to_launcher(error):
            _print_error(error)
        return 1
    except ChildProcessError as error:  # which has shown its own traceback, if it could
        _print_error(error)
        return 1
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        print("mlet: interrupted" if number == signal.SIGINT else "mlet: terminated", file=sys.stderr)
        return 128 + int(number)
    except Exception as error:
        if not _handed_to_launcher(error):
            traceback.print_exc()
        return 1


def _prepare(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    if args.check is not None:
        if args.format is not None or args.out is not None:
            raise UserError("--check stands alone; it takes the directory of a data set")
        from mlet_dist.data.check import check

        schema = check(Path(args.check))
        return {"checked": args.check, "rows": schema.rows, "positive_rate": schema.positive_rate, "ok": True}, True
    from mlet_dist.data.command import prepare_from

    prepared = prepare_from(args)
    if prepared is None:
        return {"out": args.out, "pass": args.only, "shard": args.shard or "0/1"}, True
    sizes = prepared.num_embeddings
    return {
        "out": args.out,
        "rows": prepared.rows,
        "positive_rate": prepared.positive_rate,
        "malformed": prepared.malformed,
        "tables": len(sizes),
        "num_embeddings": sum(sizes.values()),
    }, True


def _synth(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    from mlet_dist.data.synthetic import synthesize

    result = synthesize(
        Path(args.out),
        rows=args.rows,
        seed=args.seed,
        num_embeddings=args.num_embeddings,
        alpha=args.alpha,
        multi_valued=dict(args.multi_valued),
        weighted=args.weighted,
        format=args.format,
    )
    return result, True


def _train(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    from mlet_dist.training.attempt import for_this_attempt
    from mlet_dist.training.run_directory import RunDirectory

    config = _load_checked(args)
    if not _launched():
        RunDirectory(Path(config.run.dir)).check_free(for_this_attempt(config))
    if args.nproc is not None:
        return _in_ranks(args, arguments)
    _before_torch()
    from mlet_dist.training.trainer import train

    return train(config, fingerprint=args.json), True


def _evaluate(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    if args.nproc is not None:
        return _in_ranks(args, arguments)
    _before_torch()
    from mlet_dist.data.location import data_set_path
    from mlet_dist.export.evaluate import evaluate_path

    return evaluate_path(Path(args.target), data_set_path(args.data), args.split), True


def _export(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    _before_torch()
    from mlet_dist.export.collapse import export_run

    return export_run(Path(args.run), Path(args.out)), True


def _verify(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    _before_torch()
    from mlet_dist.data.location import data_set_path
    from mlet_dist.export.verify import verify_export

    result = verify_export(Path(args.export), Path(args.run), data_set_path(args.data), args.split, args.tolerance)
    return result, result["ok"]


def _compare(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    from mlet_dist.compare import compare, comparison_table

    config = _load_checked(args)
    os.environ[_PARENT] = str(os.getpid())
    result = compare(config, args.nproc or 1)
    if not args.json:
        _print(comparison_table(result))
        _print(f"\nWritten to {result['run']}: comparison.md, comparison.json, and each arm's run and export.")
        return None, result["ok"]
    return result, result["ok"]


def _plan(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    from mlet_dist.planner.hardware import load_hardware
    from mlet_dist.planner.tables import load_tables

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
    _warn(config)
    _before_torch()
    from mlet_dist.embeddings.step_time import Device
    from mlet_dist.planner.command import make_plan
    from mlet_dist.planner.report import picture, report

    plan = make_plan(config, spec, pooling_factors, Device(**hardware), args.world_size, args.local_world_size)
    if args.out is not None:
        try:
            Path(args.out).write_text(picture(plan), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from None
    if plan["shortage"] is not None:
        raise UserError(plan["shortage"])
    if not args.json:
        _print(report(plan))
        return None, True
    return plan, True


def _doctor(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    from mlet_dist.doctor import report, run_doctor

    result = run_doctor()
    if not args.json:
        _print(report(result))
        return None, result["ok"]
    return result, result["ok"]


def _load_checked(args: argparse.Namespace) -> Config:
    """The config, checked against the data set and the number of ranks before torch is imported."""
    from mlet_dist.data.location import data_set_path
    from mlet_dist.data.schema import DatasetSchema

    config = load_config(Path(args.config), args.overrides)
    schema = DatasetSchema.load(data_set_path(config.data.path))
    config.check_features(schema.dense, list(schema.num_embeddings))
    config.check_world_size(args.nproc or 1)
    if not _rank(args) and not _launched():
        _warn(config)
    return config


def _warn(config: Config) -> None:
    for warning in config.warnings():
        print(f"mlet: warning: {warning}", file=sys.stderr)


def _in_ranks(args: argparse.Namespace, arguments: list[str]) -> tuple[None, bool]:
    from mlet_dist.launcher import run_ranks

    os.environ |= {_LAUNCHED: "1", _PARENT: str(os.getpid())}
    run_ranks(args.nproc, _without_nproc(arguments))
    return None, True


def _without_nproc(arguments: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_nproc(parser)
    return parser.parse_known_args(arguments)[1]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _build_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes overrides in one place only; here they may also follow an option.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if "overrides" in args:
        args.overrides += overrides
        rest = [word for word in rest if word not in overrides]
    if rest:
        raise UserError(f"unknown argument {rest[0]!r} (see `mlet {args.name} --help`)")
    return args


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are UserErrors of one line, and whose options are not abbreviated."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _build_parser() -> argparse.ArgumentParser:
    from mlet_dist import __version__

    parser = _Parser(
        prog="mlet", description="Train recommendation models with multi-layer embeddings, serve plain TorchRec tables."
    )
    parser.add_argument("--version", action="version", version=f"mlet-dist {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., Any], text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object, the last line")
        return sub

    prepare = add(
        "prepare", _prepare, "Raw data -> Parquet parts, vocabularies, a schema and a manifest.", _PREPARE_HELP
    )
    prepare.add_argument("format", nargs="?", choices=["criteo", "avazu", "table"], help="format of the raw files")
    prepare.add_argument("raw", nargs="*", metavar="RAW", help="raw files in time order: plain or .gz, paths or URLs")
    prepare.add_argument("--out", metavar="DIR", help="directory for the data set; must not exist or be empty")
    prepare.add_argument("--schema", metavar="FILE", help="of table: a YAML file that describes the columns")
    prepare.add_argument("--min-count", type=int, help="rarer values share the out-of-vocabulary row (default 2)")
    prepare.add_argument(
        "--split", choices=["rows", "paper", "random"],
        help="rows: 80%% / 10%% / 10%% in order (default of criteo); random: the same at random (default of avazu); "
        "paper: of criteo days 1-6 (or all files but the last) train, the rest halved into test and valid; of avazu "
        "random",
    )  # fmt: skip
    prepare.add_argument("--seed", type=int, help="of the random split (default 0)")
    prepare.add_argument(
        "--max-malformed", type=float, metavar="SHARE",
        help="of a file's lines; more is an error at its end, and before it once they are more than SHARE of what is "
        "read and of 10 million lines. Ten may be malformed whatever SHARE is, 0 too, unless all are (default 0.1)",
    )  # fmt: skip
    prepare.add_argument(
        "--memory", metavar="SIZE", help="of all processes, such as 16G (default: half of the machine's)"
    )
    prepare.add_argument("--processes", type=_positive, metavar="N", help="at most N (default: all cores)")
    prepare.add_argument(
        "--pass", dest="only", choices=["read", "count", "vocabulary", "write", "merge"], help="do this pass alone"
    )
    prepare.add_argument("--shard", metavar="I/N", help="do share I of N of the pass; I is from 0 to N-1")
    prepare.add_argument("--check", metavar="DIR", help="verify a prepared data set instead of making one")

    synth = add("synth", _synth, "Criteo-shaped logs with power-law ids and a learnable label.")
    synth.add_argument("--out", required=True, help="directory to write; must not exist or be empty")
    synth.add_argument("--rows", type=int, required=True, help="number of rows")
    synth.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default %(default)s)")
    synth.add_argument(
        "--num-embeddings", type=int, default=10_000, help="rows of the largest table (default %(default)s)"
    )
    synth.add_argument("--alpha", type=float, default=1.05, help="exponent of the power law (default %(default)s)")
    synth.add_argument(
        "--multi-valued", nargs="+", type=_list_length, default=[], metavar="C3=5",
        help="features that hold lists of ids, each with the mean length of its lists",
    )  # fmt: skip
    synth.add_argument("--weighted", nargs="+", default=[], metavar="C3", help="those of them whose ids have weights")
    synth.add_argument(
        "--format", choices=["parquet", "tsv"], default="parquet",
        help="parquet: a data set to train on; tsv: raw Criteo logs for `mlet prepare` (default %(default)s)",
    )  # fmt: skip

    settings = f"settings, as section.key=value or in the YAML file:\n{describe_settings()}"
    train = add(
        "train", _train, "Train a model and evaluate it; torchrun -m mlet_dist train … does on many hosts.", settings
    )
    _add_config(train)
    compare = add(
        "compare", _compare,
        "Train, export and verify the single layer, MLET, and the single layer at MLET's effective learning rate.",
        settings,
    )  # fmt: skip
    _add_config(compare)

    plan = add(
        "plan", _plan, "Memory, bytes sent and step time of a run, for hardware that need not be here.", _PLAN_HELP
    )
    _add_settings(plan)
    plan.add_argument("--world-size", type=_positive, required=True, metavar="N", help="ranks, one a device")
    plan.add_argument(
        "--local-world-size",
        type=_positive,
        metavar="N",
        help="ranks of a node (default 8, or all where they are fewer)",
    )
    plan.add_argument(
        "--device", default="h100", metavar="NAME",
        help="a100-40, a100-80, h100, h200, b200, cpu, or a YAML file with one of your own (default %(default)s)",
    )  # fmt: skip
    plan.add_argument(
        "--tables", metavar="FILE", help="YAML file of table sizes; else those of the data set at data.path are taken"
    )
    plan.add_argument("--out", metavar="PLAN.html", help="also write a picture of the memory by rank")

    evaluate = add("evaluate", _evaluate, "AUC and LogLoss of a run or an export.")
    evaluate.add_argument("target", metavar="RUN_OR_EXPORT", help="what `mlet train` or `mlet export` made")
    _add_data(evaluate)
    _add_nproc(evaluate)

    export = add("export", _export, "Collapse W1·W2 of a finished run into plain TorchRec tables.")
    export.add_argument("run", metavar="RUN", help="what `mlet train` made")
    export.add_argument("--out", required=True, help="directory for the export; must not exist or be empty")

    verify = add(
        "verify", _verify, "Compare factorised and collapsed predictions, row by row; exit code 1 if they differ."
    )
    verify.add_argument("export", metavar="EXPORT", help="what `mlet export` made")
    verify.add_argument("--run", required=True, help="the run it was exported from")
    _add_data(verify)
    verify.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest difference between two logits (default %(default)s)"
    )

    add("doctor", _doctor, "Check this machine: versions, devices, memory; says what to type when something is off.")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    _add_nproc(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, for example configs/criteo_kaggle.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="directory of the data set, or its URL")
    parser.add_argument("--split", choices=["train", "valid", "test"], default="test", help="default %(default)s")


def _add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=_positive, metavar="N", help="start N local ranks through torch elastic")


def _list_length(text: str) -> tuple[str, float]:
    name, _, mean = text.partition("=")
    try:
        return name, float(mean)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a feature and the mean length of its lists, as in C3=5"
        ) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _rank(args: argparse.Namespace) -> int | None:
    """The number of this process among those that run the command together; None where it runs alone.

    Only train and evaluate run together: Kubeflow sets RANK for every command.
    """
    if "RANK" not in os.environ or args.name not in ("train", "evaluate") or args.nproc is not None:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        value = os.environ.get(name)
        if value is None or not value.isdecimal():
            found = "is not set" if value is None else f"is {value!r}, not a number"
            raise UserError(
                f"the environment has RANK, but {name} {found}; start the ranks by --nproc or torchrun, or unset RANK"
            )
    return int(os.environ["RANK"])


def _die_with_parent() -> None:
    """In a process that another `mlet` started: end when that one ends, be it by kill -9."""
    parent = os.environ.pop(_PARENT, None)
    if parent is None:
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # gone before that
        sys.exit(1)
    if _launched():  # torch elastic ends its ranks by SIGTERM or SIGINT: at once, and without a word
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _unwind(number: int, _: object) -> NoReturn:
    """Let SIGTERM do what Ctrl-C does, so that temporary directories are removed."""
    raise KeyboardInterrupt(number)


def _launched() -> bool:
    """Whether `--nproc` of another `mlet` started this rank: that one has checked the config and shows errors."""
    return _LAUNCHED in os.environ


def _handed_to_launcher(error: BaseException) -> bool:
    """Whether the launcher of this rank will show the error, in place of it; torchrun is told too, for its report."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    from mlet_dist.launcher import record_failure

    record_failure(error)
    return _launched()


def _before_torch() -> None:
    """Settings that must stand before torch is imported."""
    import logging
    import warnings

    # OpenMP's threads spin while they wait. Where other processes want the cores too, training took 10 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # DDP would warn on each rank of what training/sharding.py asks of it on purpose.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The libraries' start-up chatter; errors still show.
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|torchrec|fbgemm_gpu|torchmetrics)\b")


def _show(result: Result, as_json: bool) -> None:
    width = max(map(len, result))
    lines = (f"{name:{width}}  {_readable(name, value)}" for name, value in result.items())
    _print(to_json(result) if as_json else "\n".join(lines))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nobody reads on, as in `mlet … | head -1`; nor may the flush at exit fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(error: Exception) -> None:
    print("mlet: error:", one_line(str(error)), file=sys.stderr)


def _readable(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_readable(key, each)}" for key, each in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
