"""An embedding collection whose tables are stored in parts of different widths (mixed dimensions, arXiv:1909.11810)."""

from collections.abc import Mapping

import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mlet_dist.export.served_layout import ServedLayout
from mlet_dist.models.build import quantised_collection
from mlet_dist.models.spec import ModelSpec


class MixedWidthCollection(EmbeddingBagCollectionInterface):
    """Looks up and pools the rows of each part, multiplies those of narrow parts by their W2, and adds the parts up.

    ``forward`` takes the result of ``SplitIds`` and returns a KeyedTensor with d columns for each feature of the model.

    Args:
        spec: of the model.
        layout: of its tables.
        data_type: of the rows; W2 and results are float32.

    Attributes:
        parts: TorchRec's collection of the rows.
        projections: the buffer of each W2, by its state name.
    """

    def __init__(self, spec: ModelSpec, layout: ServedLayout, data_type: DataType) -> None:
        super().__init__()
        parts = [(table, part) for table in spec.tables for part in layout.tables[table.name].parts]
        stored = [
            EmbeddingBagConfig(
                name=part.name,
                num_embeddings=part.num_embeddings,
                embedding_dim=part.embedding_dim,
                feature_names=[f"{feature.name}@{part.name}" for feature in table.features],
                pooling=PoolingType.SUM,
                data_type=data_type,
            )
            for table, part in parts
        ]
        is_mean = any(table.takes_mean for table in spec.tables)
        self.parts = quantised_collection(stored, spec.is_weighted or is_mean, torch.device("cpu"))
        self._features = [feature.name for table in spec.tables for feature in table.features]
        self._dims = [table.embedding_dim for table in spec.tables for _ in table.features]
        self._configs = [
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=[feature.name for feature in table.features],
            )
            for table in spec.tables
        ]
        self.projections: dict[str, str] = {}
        self._widths = list[int]()
        pieces: dict[str, list[tuple[int, str | None]]] = {name: [] for name in self._features}
        for number, (table, part) in enumerate(parts):
            buffer = None
            if part.projection is not None:
                buffer = self.projections[part.projection] = f"projection_{number}"
                self.register_buffer(buffer, torch.zeros(part.embedding_dim, table.embedding_dim))
            for feature in table.features:
                pieces[feature.name].append((len(self._widths), buffer))
                self._widths.append(part.embedding_dim)
        self._pieces = list(pieces.values())

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        found = torch.split(self.parts(features).values(), self._widths, dim=1)
        vectors = []
        for pieces in self._pieces:
            products = [found[at] if name is None else found[at] @ getattr(self, name) for at, name in pieces]
            total = products[0]
            for product in products[1:]:
                total = total + product
            vectors.append(total)
        return KeyedTensor(keys=self._features, length_per_key=self._dims, values=torch.cat(vectors, dim=1))

    def load_projections(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill every W2 from tensors by state name."""
        for state_name, buffer in self.projections.items():
            getattr(self, buffer).copy_(tensors[state_name])

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the tables that the model sees, with d columns."""
        return self._configs

    def is_weighted(self) -> bool:
        """Return whether lookups in the parts take weights."""
        return bool(self.parts.is_weighted())
