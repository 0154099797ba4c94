"""The description of a table as the manifest of a data set records it, and back."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from mlet_dist.data.prepare.raw_formats import (
    DenseColumn,
    JsonLines,
    LabelColumn,
    SparseColumn,
    TableSpec,
    TextFormat,
)
from mlet_dist.data.prepare.splits import SplitRule


def to_record(spec: TableSpec) -> dict[str, Any]:
    """Return a description as plain data for JSON."""
    plain: dict[str, Any] = _plain(asdict(spec))
    if not spec.more_labels:  # as versions that knew one label recorded it
        del plain["more_labels"], plain["label"]["name"], plain["label"]["missing"]
    return plain


def from_record(plain: Mapping[str, Any]) -> TableSpec:
    """Return the description that ``to_record`` was called on; KeyError, TypeError or ValueError for something else."""
    text = plain["text"]
    kind = TextFormat if text is not None and "delimiter" in text else JsonLines
    split = dict(plain["split"])
    split["shares"] = {name: Fraction(share) for name, share in split["shares"].items()}
    if split["files"] is not None:
        split["files"] = {name: tuple(files) for name, files in split["files"].items()}
    return TableSpec(
        source=str(plain["source"]),
        text=None if text is None else _build(kind, text),
        label=_build(LabelColumn, plain["label"]),
        dense=tuple(_build(DenseColumn, each) for each in plain["dense"]),
        sparse=tuple(_build(SparseColumn, each) for each in plain["sparse"]),
        split=SplitRule(**split),
        max_malformed=float(plain["max_malformed"]),
        sample_weight=plain.get("sample_weight"),
        more_labels=tuple(_build(LabelColumn, each) for each in plain.get("more_labels", ())),
    )


def _build(kind: Any, plain: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    if unknown := set(plain) - known:
        raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
    return kind(**{key: tuple(each) if isinstance(each, list) else each for key, each in plain.items()})


def _plain(value: Any) -> Any:
    """Return the value in types that JSON has."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Fraction | Path) else value
