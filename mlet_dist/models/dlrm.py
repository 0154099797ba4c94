"""TorchRec's DLRM, built from a ModelSpec around multi-layer, plain or quantised tables."""

import math
from collections.abc import Mapping

import torch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantisedEmbeddingBagCollection

from mlet_dist.config.sharding_section import RowsDtype
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.planning.cost_model import Optimizer
from mlet_dist.embeddings.planning.plan_cost import DenseCost
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.models.spec import ModelSpec

_CPU = torch.device("cpu")

TABLES_PREFIX = "sparse_arch.embedding_bag_collection."
"""The prefix of ``embedding_bags.<table>.weight`` and ``projections.<table>.weight`` in the model's state dict."""


def build_dlrm(
    spec: ModelSpec,
    tables_device: torch.device,
    rows_dtype: RowsDtype | Mapping[str, RowsDtype] = "fp32",
    dense_device: torch.device = _CPU,
    hidden_dims: Mapping[str, int | None] | None = None,
) -> DLRM:
    """Build the model for training: DLRM around a MultiLayerEmbeddingBagCollection.

    The dense layers are drawn on the CPU from the seed, so their initial values are the same on any number of ranks.

    Args:
        spec: sizes, inputs and seed.
        tables_device: device of the tables; ``meta`` if they will be sharded.
        rows_dtype: dtype of W1, for all tables or by table. Export and verification support fp32 only.
        dense_device: device of the dense layers; ``meta`` if only their sizes are wanted.
        hidden_dims: k of each table; by default that of the spec for all tables.
    """
    tables = _table_configs(spec, rows_dtype)
    for table in tables:
        table.hidden_dim = table.hidden_dim if hidden_dims is None else hidden_dims[table.name]
    adaptive = AdaptiveRows(**spec.adaptive) if spec.adaptive else None
    embeddings = MultiLayerEmbeddingBagCollection(tables, spec.is_weighted, tables_device, spec.seed, adaptive)
    return build_around(embeddings, spec, dense_device)


def build_plain_dlrm(spec: ModelSpec) -> DLRM:
    """Build the model for serving: DLRM around TorchRec's EmbeddingBagCollection, unsharded on the CPU."""
    tables = [table.plain_config() for table in _table_configs(spec)]
    return build_around(EmbeddingBagCollection(tables, spec.is_weighted), spec)


def build_quantised_dlrm(spec: ModelSpec, data_type: DataType, device: torch.device) -> DLRM:
    """Build the model for serving quantised tables: DLRM around TorchRec's quantised collection, filled with zeros.

    Scales and biases have their own names in the state dict, as in TorchRec's sharded inference modules.

    Args:
        spec: sizes and inputs.
        data_type: FP32, FP16, INT8 or INT4, for all tables; lookups return float32.
        device: device of the tables; ``meta`` allocates nothing.
    """
    tables = [table.plain_config() for table in _table_configs(spec)]
    for table in tables:
        table.data_type = data_type
    return build_around(quantised_collection(tables, spec.is_weighted, device), spec).requires_grad_(False).eval()


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
    trained = build_dlrm(spec, meta, rows_dtype, meta).sparse_arch.embedding_bag_collection
    served = sum(4 * table.num_embeddings * spec.model.embedding_dim for table in spec.tables)
    return sum(each.numel() * each.element_size() for each in trained.parameters()), served


def dense_cost(
    model: DLRM, local_batch_size: int, optimizer: Optimizer, world_size: int, local_world_size: int
) -> DenseCost:
    """Return the cost of the layers other than tables for one rank."""
    tables = model.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return DenseCost(
        parameters=sum(layer.weight.numel() + layer.bias.numel() for layer in layers),
        widths=tuple(layer.out_features for layer in layers),
        features=1 + sum(len(table.feature_names) for table in tables),
        embedding_dim=tables[0].embedding_dim,
        local_batch_size=local_batch_size,
        optimizer=optimizer,
        world_size=world_size,
        local_world_size=local_world_size,
    )


def build_around(
    embeddings: torch.nn.Module,
    spec: ModelSpec,
    dense_device: torch.device = _CPU,
) -> DLRM:
    """Build DLRM around a collection of tables that returns d columns for each feature of the model."""
    with torch.random.fork_rng(devices=[]), dense_device:
        torch.manual_seed(spec.seed)
        return DLRM(
            embedding_bag_collection=embeddings,
            dense_in_features=len(spec.dense),
            dense_arch_layer_sizes=[*spec.model.bottom_mlp, spec.model.embedding_dim],
            over_arch_layer_sizes=[*spec.model.top_mlp, 1],
        )


def _table_configs(
    spec: ModelSpec, rows_dtype: RowsDtype | Mapping[str, RowsDtype] = "fp32"
) -> list[MultiLayerEmbeddingBagConfig]:
    model = spec.model
    tables = []
    dtypes = {each.name: rows_dtype if isinstance(rows_dtype, str) else rows_dtype[each.name] for each in spec.tables}
    for table in spec.tables:
        bound = model.rows_init_gain / math.sqrt(table.num_embeddings)
        tables.append(
            MultiLayerEmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=model.embedding_dim,
                hidden_dim=model.hidden_dim,
                feature_names=[feature.name for feature in table.features],
                # For a single id the mean equals the sum, which is cheaper.
                pooling=PoolingType.MEAN if model.pooling == "mean" and table.multi_valued else PoolingType.SUM,
                data_type=DataType(dtypes[table.name].upper()),
                weight_init_min=-bound,
                weight_init_max=bound,
                rows_init_std=model.rows_init_gain * model.rows_init_std if model.rows_init == "normal" else None,
                projection_init_std=model.projection_init_std,
                zero_first_row=table.name in spec.zero_first_rows,
                row_ranges=_row_ranges(spec, table.name),
                shared_row=spec.shared_rows and table.name in spec.row_ranges,
            )
        )
    return tables


def _row_ranges(spec: ModelSpec, table: str) -> list[RowRange] | None:
    return [RowRange(*each) for each in spec.row_ranges[table]] if table in spec.row_ranges else None
