"""Models built from a ModelSpec around multi-layer, plain or quantised tables."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantisedEmbeddingBagCollection

from mlet_dist.config.sharding_section import RowsDtype
from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagConfig,
    MultiLayerEmbeddingCollection,
)
from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.table_config import RowRange, plain_sequence_config
from mlet_dist.models.architectures import ARCHITECTURES
from mlet_dist.models.builder import ModelInputs, call_builder, import_builder
from mlet_dist.models.spec import TABLES_PREFIX, EmbeddingTable, ModelSpec
from mlet_dist.models.tables import collections_of, holds_sequences

_CPU = torch.device("cpu")


def build_training_model(
    spec: ModelSpec,
    tables_device: torch.device,
    rows_dtype: RowsDtype | Mapping[str, RowsDtype] = "fp32",
    dense_device: torch.device = _CPU,
    hidden_dims: Mapping[str, int | None] | None = None,
) -> nn.Module:
    """Build the model for training, around collections of multi-layer tables.

    The dense layers are drawn on the CPU from the seed, so their initial values are the same on any number of ranks.

    Args:
        spec: sizes, inputs and seed.
        tables_device: device of the tables; ``meta`` if they will be sharded.
        rows_dtype: dtype of W1, for all tables or by table. Export and verification support fp32 only.
        dense_device: device of the dense layers; ``meta`` if only their sizes are wanted.
        hidden_dims: k of each table; by default that of the spec for all tables.
    """
    return build_around(build_collections(spec, tables_device, rows_dtype, hidden_dims), spec, dense_device)


class Collections(NamedTuple):
    """The collections of a model: of tables whose vectors are pooled, and of tables of sequences."""

    bags: Any  # an nn.Module, or None
    sequences: Any = None


def build_collections(
    spec: ModelSpec,
    device: torch.device,
    rows_dtype: RowsDtype | Mapping[str, RowsDtype] = "fp32",
    hidden_dims: Mapping[str, int | None] | None = None,
) -> Collections:
    """Build the tables for training alone; the arguments are those of ``build_training_model``."""
    pooled, sequences = _split(spec, _table_configs(spec, rows_dtype, hidden_dims))
    adaptive = AdaptiveRows(**spec.adaptive) if spec.adaptive else None
    return Collections(
        MultiLayerEmbeddingBagCollection(pooled, spec.is_weighted, device, spec.seed, adaptive) if pooled else None,
        MultiLayerEmbeddingCollection(sequences, device, seed=spec.seed) if sequences else None,
    )


def _split(
    spec: ModelSpec, tables: list[MultiLayerEmbeddingBagConfig]
) -> tuple[list[MultiLayerEmbeddingBagConfig], list[MultiLayerEmbeddingBagConfig]]:
    """Return the tables whose vectors are pooled, and those of sequences."""
    names = spec.sequence_tables
    return [each for each in tables if each.name not in names], [each for each in tables if each.name in names]


def build_serving_model(spec: ModelSpec) -> nn.Module:
    """Build the model for serving, around TorchRec's EmbeddingBagCollection and EmbeddingCollection, on the CPU."""
    pooled, sequences = _split(spec, _table_configs(spec))
    found = Collections(
        EmbeddingBagCollection([table.plain_config() for table in pooled], spec.is_weighted) if pooled else None,
        EmbeddingCollection([plain_sequence_config(table) for table in sequences]) if sequences else None,
    )
    return build_around(found, spec)


def build_quantised_model(spec: ModelSpec, data_type: DataType, device: torch.device) -> nn.Module:
    """Build the model for serving quantised tables, around TorchRec's quantised collection, filled with zeros.

    Scales and biases have their own names in the state dict, as in TorchRec's sharded inference modules.

    Args:
        spec: sizes and inputs.
        data_type: FP32, FP16, INT8 or INT4, for all tables; lookups return float32.
        device: device of the tables; ``meta`` allocates nothing.
    """
    tables = [table.plain_config() for table in _table_configs(spec)]
    for table in tables:
        table.data_type = data_type
    found = Collections(quantised_collection(tables, spec.is_weighted, device))
    return build_around(found, spec).requires_grad_(False).eval()


def quantised_collection(
    tables: list[EmbeddingBagConfig], is_weighted: bool, device: torch.device
) -> QuantisedEmbeddingBagCollection:
    """Build TorchRec's collection of tables with the data types of their configs, filled with zeros."""
    return QuantisedEmbeddingBagCollection(
        tables,
        is_weighted,
        device,
        register_tbes=True,
        quant_state_dict_split_scale_bias=True,
        row_alignment=1,  # bytes; GPUs need 16, with which a row of 16 int8 values takes 32 bytes instead of 20
    )


def table_bytes(spec: ModelSpec, rows_dtype: RowsDtype | Mapping[str, RowsDtype] = "fp32") -> tuple[int, int]:
    """Return the bytes of all tables in training (W1 in ``rows_dtype``, W2 float32) and in serving (W float32)."""
    meta = torch.device("meta")
    trained = (each for each in build_collections(spec, meta, rows_dtype) if each is not None)
    served = sum(4 * table.num_embeddings * table.embedding_dim for table in spec.tables)
    return sum(each.numel() * each.element_size() for part in trained for each in part.parameters()), served


def multi_layer_tables(model: nn.Module) -> dict[str, MultiLayerTables]:
    """Return the collections of a model of ``build_training_model``, before it is sharded, by their names in it."""
    found = {}
    for path, tables in collections_of(model).items():
        assert isinstance(tables, MultiLayerTables)
        found[path] = tables
    return found


def row_tables(model: nn.Module) -> list[MultiLayerEmbeddingBagConfig]:
    """Return the tables that store the rows of such a model."""
    return [table for tables in multi_layer_tables(model).values() for table in tables.row_tables()]


def build_around(collections: Collections, spec: ModelSpec, dense_device: torch.device = _CPU) -> nn.Module:
    """Build the network of a spec around collections of tables that return the vectors of each feature of the model.

    Raises:
        UserError: ``model.builder`` cannot be imported, or does not return a module that holds the tables once; or a
            setting of the network does not fit the features.
    """
    of_tables = spec.embedding_dims
    dims = {feature.name: of_tables[feature.table_name] for feature in spec.sparse}
    sequences = tuple(feature.name for feature in spec.sparse if feature.table_name in spec.sequence_tables)
    inputs = ModelInputs(
        collections.bags,
        collections.sequences,
        spec.dense,
        tuple(dims),
        sequences,
        dims,
        spec.model,
        spec.labels,
    )
    with torch.random.fork_rng(devices=[]), dense_device:
        torch.manual_seed(spec.seed)
        if spec.model.builder is None:
            return ARCHITECTURES[spec.model.name](inputs)
        return call_builder(spec.model.builder, import_builder(spec.model.builder), inputs)


def with_tables_prefix(spec: ModelSpec) -> ModelSpec:
    """Return the spec with the names that the network gives to its collections of tables, and check the network.

    Raises:
        UserError: as ``build_around``.
        ValueError: the name of a table is not a valid name of a module.
    """
    meta = torch.device("meta")
    model = build_training_model(dataclasses.replace(spec, row_ranges={}, adaptive={}), meta, dense_device=meta)
    prefixes = {holds_sequences(each): f"{path}." for path, each in collections_of(model).items()}
    return dataclasses.replace(
        spec, tables_prefix=prefixes.get(False, TABLES_PREFIX), sequences_prefix=prefixes.get(True, "")
    )


def _table_configs(
    spec: ModelSpec,
    rows_dtype: RowsDtype | Mapping[str, RowsDtype] = "fp32",
    hidden_dims: Mapping[str, int | None] | None = None,
) -> list[MultiLayerEmbeddingBagConfig]:
    tables = []
    dtypes = {each.name: rows_dtype if isinstance(rows_dtype, str) else rows_dtype[each.name] for each in spec.tables}
    for table in spec.tables:
        own = table.settings
        bound = own.rows_init_gain / math.sqrt(table.num_embeddings)
        tables.append(
            MultiLayerEmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=own.embedding_dim,
                hidden_dim=own.hidden_dim if hidden_dims is None else hidden_dims[table.name],
                feature_names=[feature.name for feature in table.features],
                pooling=_pooling(table),
                data_type=DataType(dtypes[table.name].upper()),
                weight_init_min=-bound,
                weight_init_max=bound,
                rows_init_std=own.rows_init_gain * own.rows_init_std if own.rows_init == "normal" else None,
                projection_init_std=own.projection_init_std,
                projection_init=own.projection_init,
                zero_first_row=table.name in spec.zero_first_rows,
                row_ranges=_row_ranges(spec, table.name),
                shared_row=spec.shared_rows and table.name in spec.row_ranges,
            )
        )
    return tables


def _pooling(table: EmbeddingTable) -> PoolingType:
    if table.sequence:
        return PoolingType.NONE
    return PoolingType.MEAN if table.takes_mean else PoolingType.SUM


def _row_ranges(spec: ModelSpec, table: str) -> list[RowRange] | None:
    return [RowRange(*each) for each in spec.row_ranges[table]] if table in spec.row_ranges else None
