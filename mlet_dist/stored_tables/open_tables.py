"""Open all tables of a model on disk."""

from collections.abc import Mapping
from typing import Any

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.models.spec import BAG_ROWS, TABLES_PREFIX, EmbeddingTable, ModelSpec
from mlet_dist.stored_tables.adaptive_source import open_adaptive_tables
from mlet_dist.stored_tables.ranged_source import open_ranged_table, pools_of
from mlet_dist.stored_tables.table_source import TableSource, open_table


def open_tables(spec: ModelSpec, files: ChunkedTensors, prefix: str, *, spread: bool) -> dict[str, TableSource]:
    """Return the tables of a model by name, after checking the shapes of their tensors.

    Args:
        spec: the model.
        files: an open checkpoint or export.
        prefix: of the model's names in the files.
        spread: whether rows are stored in the order of ``row_order``, rather than by id.

    Raises:
        UserError: a tensor is missing or has another shape.
    """

    def opened(table: EmbeddingTable) -> TableSource:
        shape = table.num_embeddings, table.embedding_dim
        state_name = spec.rows_name(table.name)
        return open_table(table.name, shape, table.hidden_dim, files, prefix, state_name, spread=spread)

    if spec.adaptive:
        adaptive = open_adaptive_tables(spec, files, prefix)
        return {each.name: opened(each) for each in spec.tables if each.name not in adaptive} | adaptive
    pools = pools_of(spec, spread=spread) if spec.row_ranges else {}
    return {
        each.name: open_ranged_table(each, spec, pools, files, prefix) if each.name in spec.row_ranges else opened(each)
        for each in spec.tables
    }


def open_factors(about: Mapping[str, Any], files: ChunkedTensors, prefix: str) -> dict[str, TableSource]:
    """Return the tables of `mlet factorize` that belong to no model of this project; ``about`` is of their manifest.

    Raises:
        UserError: as for ``open_tables``.
    """
    return {
        each["name"]: open_table(
            each["name"],
            each["shape"],
            each["hidden_dim"],
            files,
            prefix,
            f"{TABLES_PREFIX}{BAG_ROWS}.{each['name']}.weight",
        )
        for each in about["factorized"]["tables"]
    }
