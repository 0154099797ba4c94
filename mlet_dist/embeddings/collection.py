"""The unsharded multi-layer embedding module (MLET, arXiv:2006.05623), a drop-in for TorchRec's EmbeddingBagCollection.

A table W ``(n, d)`` is trained as the product of two layers, W1 ``(n, k)`` and W2 ``(k, d)``, with k >= d as a rule.
Pooling is linear, so W2 is applied to the pooled rows: ``pool(W1[ids]) · W2``. After training ``collapse`` returns the
plain table W = W1·W2 for serving.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from mlet_dist.embeddings.collapse import collapse_rows
from mlet_dist.embeddings.initializers import RowInitializer
from mlet_dist.embeddings.input_check import check_batch, smallest_tables
from mlet_dist.embeddings.projection import Projection, project


@dataclass
class MultiLayerEmbeddingBagConfig(EmbeddingBagConfig):
    """TorchRec's EmbeddingBagConfig with the width k of the first layer.

    ``embedding_dim`` stays d, the width that the model receives. With ``data_type`` FP16 both W1 and the served table
    are stored in half precision; W2 stays float32. W1 is drawn uniformly from [``weight_init_min``,
    ``weight_init_max``), by default ±1/sqrt(num_embeddings), or by ``init_fn`` if one is given.

    Args:
        hidden_dim: k, the width of W1; None trains a plain single-layer table.
        rows_init_std: if given, W1 is drawn from N(0, rows_init_std^2) instead.
        projection_init_std: standard deviation of W2's initial values; None means 1/sqrt(k), which has unit gain.
        zero_first_row: whether row 0 of W1 begins at zero, for tables whose id 0 stands for values that training never
            sees: the row W[0] that is served for them is then zero, and not random.

    Raises:
        ValueError: a dimension is below 1, ``data_type`` is neither FP32 nor FP16, or ``zero_first_row`` comes with an
            ``init_fn``. The message names the table.
    """

    hidden_dim: int | None = None
    rows_init_std: float | None = None
    projection_init_std: float | None = None
    zero_first_row: bool = False

    def __post_init__(self) -> None:
        for name in ("num_embeddings", "embedding_dim", "hidden_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"table {self.name!r}: {name} is {value}, it must be at least 1")
        if self.data_type not in (DataType.FP32, DataType.FP16):
            raise ValueError(f"table {self.name!r}: data_type is {self.data_type.name}; rows are FP32 or FP16")
        if self.zero_first_row and self.init_fn is not None:
            raise ValueError(f"table {self.name!r}: zero_first_row cannot go with an init_fn")

    @property
    def row_width(self) -> int:
        """The columns of W1: k, or d for a single-layer table."""
        return self.hidden_dim if self.hidden_dim is not None else self.embedding_dim

    def rows_config(self, seed: int) -> EmbeddingBagConfig:
        """Return the TorchRec config of W1: ``row_width`` columns, initial values fixed by seed, table and row."""
        plain = self.plain_config()
        plain.embedding_dim = self.row_width
        if self.init_fn is not None:
            return plain
        low, high = self.get_weight_init_min(), self.get_weight_init_max()
        plain.init_fn = RowInitializer(
            f"embedding_bags.{self.name}",
            self.num_embeddings,
            "uniform" if self.rows_init_std is None else "normal",
            scale=(high - low) / 2 if self.rows_init_std is None else self.rows_init_std,
            seed=seed,
            center=(high + low) / 2 if self.rows_init_std is None else 0.0,
            dtype=data_type_to_dtype(self.data_type),
            zero_first_row=self.zero_first_row,
        )
        return plain

    def plain_config(self) -> EmbeddingBagConfig:
        """Return the TorchRec config of the served table, which has d columns."""
        names = [field.name for field in fields(EmbeddingBagConfig) if field.init]
        return EmbeddingBagConfig(**{name: getattr(self, name) for name in names})


class MultiLayerEmbeddingBagCollection(EmbeddingBagCollection):
    """An EmbeddingBagCollection whose tables are trained as W = W1·W2, with W1 ``(n, k)`` and W2 ``(k, d)``.

    It maps a KeyedJaggedTensor to a KeyedTensor of d-dimensional vectors, and ``embedding_bag_configs()`` reports d, so
    TorchRec's models accept it unchanged. In the state dict W1 is ``embedding_bags.<table>.weight`` and W2 is
    ``projections.<table>.weight``.

    Args:
        tables: one config per table. TorchRec's own EmbeddingBagConfig is treated as a single-layer table.
        is_weighted: whether the KeyedJaggedTensor carries per-sample weights.
        device: device of the parameters; ``meta`` allocates nothing.
        seed: with table and row it determines the initial values.

    Raises:
        ValueError: two tables have the same name, a name is not a valid key of torch's ModuleDict, or a dimension is
            below 1.

    Example::

        tables = [MultiLayerEmbeddingBagConfig(name="t1", num_embeddings=1000, embedding_dim=16, hidden_dim=64,
                                               feature_names=["f1"])]
        embeddings = MultiLayerEmbeddingBagCollection(tables, device=torch.device("meta"))
        model = DLRM(embeddings, dense_in_features=13, dense_arch_layer_sizes=[64, 16], over_arch_layer_sizes=[64, 1])
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        seed: int = 0,
    ) -> None:
        multi_layer = [_as_multi_layer(table) for table in tables]
        for table in multi_layer:
            if not table.name or "." in table.name or hasattr(nn.ModuleDict, table.name):
                raise ValueError(f"table {table.name!r}: no module of torch can have this name; choose another")
        super().__init__([table.rows_config(seed) for table in multi_layer], is_weighted, device)
        self._tables = multi_layer
        self.seed = seed
        self.projections = build_projections(self._tables, seed, self.device)
        self._table_of_key = table_of_key(self._tables)
        self._smallest_tables = smallest_tables(self._tables)
        self.register_load_state_dict_pre_hook(_check_before_load)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up, pool and project.

        Returns:
            KeyedTensor with values ``(B, sum of d)`` float32.

        Raises:
            ValueError: the batch is invalid (see ``input_check.check_batch``), or it has per-sample weights and a table
                has FP16 rows. The message names the table.
        """
        features = maybe_td_to_kjt(features, None)
        half = [table.name for table in self._tables if table.data_type == DataType.FP16]
        if half and self.is_weighted():
            raise ValueError(
                f"table {half[0]!r}: torch cannot pool FP16 rows with per-sample weights in an unsharded module; "
                "use FP32"
            )
        if not torch.compiler.is_compiling():
            check_batch(features, self._smallest_tables, self.is_weighted())
        weights = projection_weights(self.projections)
        return project(super().forward(features), by_key(weights, self._table_of_key))

    def reset_parameters(self) -> None:
        """Draw the initial values of both layers again; does nothing on the meta device."""
        super().reset_parameters()
        # TorchRec's constructor calls this before the projections exist; each projection then draws its own values.
        for projection in getattr(self, "projections", {}).values():
            projection.reset_parameters()

    def embedding_bag_configs(self) -> list[MultiLayerEmbeddingBagConfig]:
        """Return the tables' configs, whose ``embedding_dim`` is d, as the model expects."""
        return list(self._tables)

    def rows(self) -> EmbeddingBagCollection:
        """Return the first layer alone: a plain collection of W1 over the same parameters, with sum pooling.

        TorchRec's row-wise mean pooling is wrong where tables of several sharding types share a collection or a
        feature, so the sharded module applies the mean itself.
        """
        tables = [dataclasses.replace(table, pooling=PoolingType.SUM) for table in self._embedding_bag_configs]
        rows = EmbeddingBagCollection(tables, self.is_weighted(), torch.device("meta"))
        rows.embedding_bags = self.embedding_bags
        return rows

    @torch.no_grad()
    def collapse(self) -> EmbeddingBagCollection:
        """Return the plain EmbeddingBagCollection with W = W1·W2 for serving (MLET paper, section 2).

        On the meta device only shapes are computed.
        """
        tables = [table.plain_config() for table in self._tables]
        device = next(self.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            plain = EmbeddingBagCollection(tables, self.is_weighted(), device)
        if device.type != "meta":
            weights = projection_weights(self.projections)
            for name, bag in plain.embedding_bags.items():
                rows = self.embedding_bags[name].weight
                bag.weight.copy_(collapse_rows(rows, weights[name]) if name in weights else rows)
        return plain


def build_projections(
    tables: list[MultiLayerEmbeddingBagConfig], seed: int, device: torch.device | None
) -> nn.ModuleDict:
    """Build one Projection for each multi-layer table, keyed by table name. Single-layer tables have none."""
    return nn.ModuleDict(
        {
            table.name: Projection(
                table.name,
                table.hidden_dim,
                table.embedding_dim,
                1 / math.sqrt(table.hidden_dim) if table.projection_init_std is None else table.projection_init_std,
                seed,
                device,
            )
            for table in tables
            if table.hidden_dim is not None
        }
    )


def projection_weights(projections: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """Return W2 ``(k, d)`` by table name."""
    return {table: projection.get_parameter("weight") for table, projection in projections.items()}


def table_of_key(tables: list[MultiLayerEmbeddingBagConfig]) -> dict[str, str]:
    """Return the table of each key of the output KeyedTensor (TorchRec names keys ``feature`` or ``feature@table``)."""
    names = get_embedding_names_by_table(tables)
    return {key: table.name for table, keys in zip(tables, names, strict=True) for key in keys}


def by_key(weights: Mapping[str, torch.Tensor], table_of_key: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Turn weights by table into weights by key of the output KeyedTensor, for the keys that have one."""
    return {key: weights[table] for key, table in table_of_key.items() if table in weights}


def check_loaded_shapes(tables: Sequence[MultiLayerEmbeddingBagConfig], state: Mapping[str, Any], prefix: str) -> None:
    """Check the shapes of W1 and W2 in a state dict; names that are missing are skipped.

    Raises:
        ValueError: W1's columns differ from W2's rows, or the shape of either differs from the table's.
    """
    for table in tables:
        rows = state.get(f"{prefix}embedding_bags.{table.name}.weight")
        projection = state.get(f"{prefix}projections.{table.name}.weight")
        if rows is not None and projection is not None:
            check_layers_fit(table.name, rows.shape, projection.shape)
        expected = {"W1": (table.num_embeddings, table.row_width), "W2": (table.row_width, table.embedding_dim)}
        for layer, tensor in (("W1", rows), ("W2", projection)):
            if tensor is not None and tuple(tensor.shape) != expected[layer]:
                shapes = f"{tuple(tensor.shape)} in the state and {expected[layer]} in the module"
                raise ValueError(f"table {table.name!r}: {layer} is {shapes}")


def check_layers_fit(table: str, rows: Sequence[int], projection: Sequence[int]) -> None:
    """Raise ValueError unless W1 of shape ``rows`` has as many columns as W2 of shape ``projection`` has rows."""
    if rows[1] != projection[0]:
        raise ValueError(f"table {table!r}: W1 has {rows[1]} columns and W2 has {projection[0]} rows")


def _check_before_load(
    module: MultiLayerEmbeddingBagCollection, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    check_loaded_shapes(module.embedding_bag_configs(), state_dict, prefix)


def _as_multi_layer(config: EmbeddingBagConfig) -> MultiLayerEmbeddingBagConfig:
    if isinstance(config, MultiLayerEmbeddingBagConfig):
        table = config
    else:
        table = MultiLayerEmbeddingBagConfig(
            **{field.name: getattr(config, field.name) for field in fields(EmbeddingBagConfig) if field.init}
        )
        limits = {"a": table.get_weight_init_min(), "b": table.get_weight_init_max()}
        if (
            isinstance(table.init_fn, partial)
            and table.init_fn.func is nn.init.uniform_
            and not table.init_fn.args
            and table.init_fn.keywords == limits
        ):
            table.init_fn = None  # TorchRec's default, which draws different values on every rank
    if not table.feature_names:
        table.feature_names = [table.name]
    return table
