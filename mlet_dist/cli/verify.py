"""`mlet verify`."""

import argparse
import math
from pathlib import Path
from typing import Any

from mlet_dist.cli.options import add_checkpoint_choice, add_data, choice_of
from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import configure_torch
from mlet_dist.formatting import text_table

TEXT = "Compare the trained model with its exports; the exit code is 1 if one is outside its tolerance."
EPILOG = None
_ENCODINGS = ("fp16", "int8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("export", metavar="EXPORT", help="directory that `mlet export` made")
    parser.add_argument(
        "--run", required=True, metavar="RUN", help="directory of the run that was exported, or of a checkpoint of it"
    )
    add_checkpoint_choice(parser, default="the one that EXPORT was made from if RUN has it, else the last")
    add_data(parser)
    parser.add_argument(
        "--tolerance", type=_difference, default=1e-5, metavar="X",
        help="for float32 tables: the largest allowed difference between two logits, and between two values of a "
        "table relative to its largest value (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--auc-tolerance", type=_auc_change, nargs="+", default=[], metavar="int8=0.001",
        help="for quantised tables: the largest allowed change of the AUC, by encoding "
        "(default: fp16=0.0005 int8=0.0005 int4=0.002)",
    )  # fmt: skip
    parser.add_argument(
        "--scores", type=Path, metavar="DIR",
        help="also write the predictions of each output for all rows of the split to this directory, as int8.parquet",
    )  # fmt: skip


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    configure_torch()
    from mlet_dist.data.location import data_set_path
    from mlet_dist.export.verify.run_verify import verify_export
    from mlet_dist.export.verify.tolerances import DEFAULT_TOLERANCES, Tolerances

    tolerances = Tolerances(args.tolerance, {**DEFAULT_TOLERANCES.auc, **dict(args.auc_tolerance)})
    data, choice = data_set_path(args.data), choice_of(args)
    result = verify_export(Path(args.export), Path(args.run), data, args.split, tolerances, choice, args.scores)
    if args.json:
        return result, result["ok"]
    print_text(verification_table(result))
    return None, result["ok"]


def _difference(text: str) -> float:
    try:
        most = float(text)
    except ValueError:
        most = math.nan
    if not 0 <= most < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return most


def _auc_change(text: str) -> tuple[str, float]:
    name, _, most = text.partition("=")
    try:
        if name not in _ENCODINGS or not 0 <= float(most) <= 1:
            raise ValueError
        return name, float(most)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(_ENCODINGS)} and a change of the AUC from 0 to 1, such as int8=0.001"
        ) from None


def _metric(value: float | None, digits: str) -> str:
    """Return a metric as text; None and NaN mean that it is undefined."""
    return "undefined" if value is None or math.isnan(value) else f"{value:{digits}}"


def _of_label(name: str, prefix: str) -> str:
    return f"{name} ({prefix.removesuffix('_')})" if prefix else name


def verification_table(result: dict[str, Any]) -> str:
    """Return the result of a verification as a table, one row for each output of the export."""
    names = ("", "tables", "AUC", "change", "LogLoss", "change", "largest difference", "largest table error", "")
    labels = [key.removesuffix("auc_run") for key in result if key.endswith("auc_run")]  # "", or "click_", …
    lines = [
        (
            _of_label("factorised", label),
            *("", _metric(result[f"{label}auc_run"], ".6f"), "", _metric(result[f"{label}logloss_run"], ".6f")),
            *("", "", "", ""),
        )
        for label in labels
    ]
    for name, found, label in ((*output, label) for output in result["outputs"].items() for label in labels):
        unit = "logit" if "max_abs_logit_diff" in found else "probability"
        table, error = max(found["tables"].items(), key=lambda each: each[1]["relative_error"])
        lines.append(
            (
                _of_label(name, label),
                found["encoding"],
                _metric(found[f"{label}auc"], ".6f"),
                _metric(found[f"{label}auc_change"], "+.1e"),
                _metric(found[f"{label}logloss"], ".6f"),
                _metric(found[f"{label}logloss_change"], "+.1e"),
                f"{found[f'max_abs_{unit}_diff']:.1e} ({unit}, row {found['worst_row']:,})",
                f"{error['relative_error']:.1e} of {table}",
                "ok" if found["ok"] else "FAILED",
            )
        )
    return "\n".join([f"{result['rows']:,} rows of {result['split']}", *text_table(names, lines, left=len(names))])
