"""The rules of ``preprocessing.json``, which an export carries: how a server makes the inputs of a model from raw rows.

They follow from the description of the raw table; defaults are written out, so that a server need not know them.
"""

from collections.abc import Mapping
from typing import Any

from mlet_dist.data.hashing import salt_of
from mlet_dist.data.prepare.counting import Scale
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.raw_formats import DenseColumn, SparseColumn, TableSpec
from mlet_dist.data.prepare.raw_values import MISSING_NUMBERS, missing_categories, missing_numbers
from mlet_dist.data.prepare.recorded_description import from_record, to_record
from mlet_dist.data.prepare.vocabulary_file import SUFFIX

FORMAT_VERSION = 1


def rules_of(like: LikeDataset) -> dict[str, Any]:
    """Return the content of ``preprocessing.json`` for the columns and features of a data set, in their order."""
    spec, sizes = like.description, like.schema.num_embeddings
    columns = [each.column for each in spec.dense]
    for each in spec.sparse:
        columns += [each.column] if each.weights is None else [each.column, each.weights]
    return {
        "format_version": FORMAT_VERSION,
        "columns": list(dict.fromkeys(columns)),
        "missing_weights": list(MISSING_NUMBERS),
        "dense": [_dense(each, like.scales) for each in spec.dense],
        "sparse": [_sparse(each) for each in spec.sparse],
        "tables": {each.table_name: _table(each, sizes[each.name]) for each in spec.sparse},
        "description": to_record(spec),
    }


def description_of(rules: Mapping[str, Any]) -> TableSpec:
    """Return the description of the raw table that rules were made from.

    Raises:
        KeyError, TypeError or ValueError: these are no rules of a version that this one reads.
    """
    if rules["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version is {rules['format_version']}, and this version reads {FORMAT_VERSION}")
    return from_record(rules["description"])


def _dense(dense: DenseColumn, scales: Mapping[str, Scale]) -> dict[str, Any]:
    scale = scales.get(dense.name)
    given = dense.missing_values
    return {
        "name": dense.name,
        "column": dense.column,
        "transform": dense.transform,
        "missing": dense.missing,
        "integer": dense.integer,
        "missing_texts": list(MISSING_NUMBERS if given is None else ("", *given)),
        "ignore_case": given is None,
        "missing_numbers": missing_numbers(given),
        "mean": None if scale is None else scale.mean,
        "deviation": None if scale is None else scale.deviation,
    }


def _sparse(sparse: SparseColumn) -> dict[str, Any]:
    given = sparse.missing_values
    return {
        "name": sparse.name,
        "column": sparse.column,
        "table": sparse.table_name,
        "cast": sparse.cast,
        "missing_texts": list(missing_categories(sparse.cast, given)),
        "ignore_case": sparse.cast == "integer" and given is None,
        "multi_valued": sparse.multi_valued,
        "separator": sparse.separator,
        "separator_in_brackets": (sparse.separator or ",").strip(),
        "weights": sparse.weights,
        "weight_separator": sparse.weight_separator,
        "max_len": sparse.max_len,
        "keep": sparse.keep,
    }


def _table(sparse: SparseColumn, num_embeddings: int) -> dict[str, Any]:
    return {
        "num_embeddings": num_embeddings,
        "vocabulary": f"{sparse.table_name}{SUFFIX}" if sparse.encoding == "vocabulary" else None,
        "salt": f"{int(salt_of(sparse.table_name)):016x}",
    }
