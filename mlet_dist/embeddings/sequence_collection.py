"""The unsharded collection of sequences: multi-layer tables whose rows are not pooled.

It is a drop-in for TorchRec's EmbeddingCollection. The ids of a batch become d-dimensional rows of W = W1·W2, in their
order, for networks that attend over a history.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig, PoolingType, data_type_to_dtype
from torchrec.modules.embedding_modules import (
    EmbeddingCollection,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from mlet_dist.embeddings.input_check import check_batch, smallest_tables, without_weights
from mlet_dist.embeddings.multi_layer_tables import (
    MultiLayerTables,
    build_projections,
    check_before_load,
    check_names,
    projection_weights,
)
from mlet_dist.embeddings.projection import Projection, project_rows
from mlet_dist.embeddings.row_ranges import tables_of_rows
from mlet_dist.embeddings.table_config import (
    MultiLayerEmbeddingBagConfig,
    as_multi_layer,
    plain_sequence_config,
)


class MultiLayerEmbeddingCollection(MultiLayerTables, EmbeddingCollectionInterface):
    """An EmbeddingCollection whose tables are trained as W = W1·W2, with W1 ``(n, k)`` and W2 ``(k, d)``.

    It maps a KeyedJaggedTensor to a JaggedTensor for each feature, with a row of d columns for each id. Per-sample
    weights are ignored, as in TorchRec. In the state dict W1 is ``embeddings.<table>.weight`` and W2 is
    ``projections.<table>.weight``. Rows of W1 are stored in the order of ``row_order``.

    Args:
        tables: one config per table, all with the same ``embedding_dim``, d; ``hidden_dim``, k, may differ. TorchRec's
            own EmbeddingConfig is treated as a single-layer table.
        device: device of the parameters; ``meta`` allocates nothing.
        need_indices: whether the JaggedTensors have the ids as their weights.
        seed: with table and row it determines the initial values.

    Raises:
        ValueError: the tables differ in d, a table is pooled or has row ranges, two tables have the same name, a name
            is not a valid key of torch's ModuleDict, or a dimension is below 1.

    Example::

        tables = [MultiLayerEmbeddingConfig(name="products", num_embeddings=1000, embedding_dim=16, hidden_dim=64,
                                            feature_names=["history", "candidate"])]
        sequences = MultiLayerEmbeddingCollection(tables)
        history = sequences(batch)["history"].to_padded_dense(50)
    """

    rows_name = "embeddings"

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig | MultiLayerEmbeddingBagConfig],
        device: torch.device | None = None,
        need_indices: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._tables = [as_multi_layer(table) for table in tables]
        check_names(self._tables)
        for table in self._tables:
            if table.pooling != PoolingType.NONE:
                raise ValueError(
                    f"table {table.name!r}: has pooling {table.pooling.name}, but its rows are not pooled here; give a "
                    "MultiLayerEmbeddingConfig"
                )
            if table.row_ranges is not None:
                raise ValueError(
                    f"table {table.name!r}: rows of different widths cannot be sequences; leave row_ranges out"
                )
            if table.embedding_dim != self._tables[0].embedding_dim:
                first = self._tables[0]
                raise ValueError(
                    f"table {table.name!r}: embedding_dim is {table.embedding_dim}, and that of table {first.name!r} "
                    f"is {first.embedding_dim}; all tables of a collection of sequences have the same"
                )
        self._row_tables = tables_of_rows(self._tables, seed)
        self._rows_configs = [table.rows_config(seed) for table in self._row_tables]
        self.seed, self.adaptive, self._is_weighted = seed, None, False
        self._need_indices = need_indices
        self._device = device if device is not None else torch.device("cpu")
        self.embeddings = nn.ModuleDict()
        for config in self._rows_configs:
            dtype = data_type_to_dtype(config.data_type)
            undrawn = torch.empty(config.num_embeddings, config.embedding_dim, dtype=dtype, device=self._device)
            self.embeddings[config.name] = nn.Embedding.from_pretrained(undrawn, freeze=False)
        self.projections = build_projections(self._tables, seed, self._device)
        self._smallest_tables = smallest_tables(self._tables)
        self.register_load_state_dict_pre_hook(check_before_load)
        self._draw_rows()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Look up and project.

        Returns:
            By feature, or ``feature@table`` for a feature of several tables, a JaggedTensor with values ``(N, d)``
            float32 for N ids.

        Raises:
            ValueError: the batch is invalid (see ``input_check.check_batch``). The message names the table.
        """
        features = without_weights(maybe_td_to_kjt(features, None))
        if not torch.compiler.is_compiling():
            check_batch(features, self._smallest_tables, is_weighted=False)
        parts, weights = features.to_dict(), projection_weights(self.projections)
        found = {}
        for table, keys in zip(self._tables, self.embedding_names_by_table(), strict=True):
            for feature, key in zip(table.feature_names, keys, strict=True):
                ids, order = parts[feature].values(), table.row_order
                assert order is not None
                vectors = self.embeddings[table.name](order.stored_rows(ids)).float()
                if table.name in weights:
                    vectors = project_rows(vectors, [len(vectors)], weights[table.name].unsqueeze(0))
                found[key] = JaggedTensor(
                    vectors, lengths=parts[feature].lengths(), weights=ids if self._need_indices else None
                )
        return found

    def reset_parameters(self) -> None:
        """Draw the initial values of both layers again; does nothing on the meta device."""
        self._draw_rows()
        for projection in self.projections.values():
            assert isinstance(projection, Projection)
            projection.reset_parameters()

    @torch.no_grad()
    def _draw_rows(self) -> None:
        if self._device.type != "meta":
            for config in self._rows_configs:
                assert config.init_fn is not None
                config.init_fn(self.row_weight(config.name))

    def embedding_configs(self) -> list[MultiLayerEmbeddingBagConfig]:
        """Return the tables' configs, whose ``embedding_dim`` is d, as the model expects, with pooling NONE."""
        return self.table_configs()

    def embedding_names_by_table(self) -> list[list[str]]:
        """Return the keys of the output of each table."""
        names: list[list[str]] = get_embedding_names_by_table(self._tables)
        return names

    def embedding_dim(self) -> int:
        """Return d."""
        return self._tables[0].embedding_dim

    def need_indices(self) -> bool:
        """Return whether the output has the ids as weights."""
        return self._need_indices

    def is_weighted(self) -> bool:
        """Return False: per-sample weights are ignored."""
        return False

    @property
    def device(self) -> torch.device:
        """The device of the parameters when they were made."""
        return self._device

    @torch.no_grad()
    def collapse(self) -> EmbeddingCollection:
        """Return the plain EmbeddingCollection with W = W1·W2 for serving (MLET paper, section 2).

        On the meta device only shapes are computed.
        """
        device = next(self.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            plain = EmbeddingCollection(
                [plain_sequence_config(table) for table in self._tables], device, need_indices=self._need_indices
            )
        if device.type != "meta":
            self._fill_collapsed({name: each.weight for name, each in plain.embeddings.items()})
        return plain
