"""The LogLoss of a model on a split with other tables, of which only the rows that the split looks up are in memory."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedTensor

from mlet_dist.data.loading.loader import Batch
from mlet_dist.data.location import DataPath
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.export.encoding import Encoding
from mlet_dist.export.seen_rows import SeenRows, padded, renumber, with_rows
from mlet_dist.export.served_sources import is_narrow
from mlet_dist.export.sized_model import RefittedTable
from mlet_dist.export.source import ModelSource
from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.models.tables import collections_of
from mlet_dist.stored_tables.refitted_source import vectors_of_ids
from mlet_dist.training.evaluation import evaluation_loader
from mlet_dist.training.label_metrics import by_row
from mlet_dist.training.process_group import Worker

_PROCESS = Worker(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
_BLOCK_ROWS = 1 << 16
_MOST_ROWS = 1 << 20
"""Rows of the split that are measured, from its beginning."""

Vectors = Mapping[str, torch.Tensor]
"""By table, the vectors ``(seen, d)`` float32 of the rows that the split looks up."""


class MeasuredSplit:
    """A split of a data set, and the rows that it looks up.

    Args:
        source: the model, which says which inputs it takes, and how many rows are evaluated together.
        data: the data set.
        split: its name.

    Attributes:
        rows: number of rows that are measured.
        ids: by table, the distinct ids that are looked up, ascending int64.

    Raises:
        UserError: the data set cannot be read.
    """

    def __init__(self, source: ModelSource, data: DataPath, split: str) -> None:
        self._source, self._data, self._split = source, data, split
        all_rows = DatasetSchema.load(data).rows[split]
        self._share = min(1.0, _MOST_ROWS / all_rows)
        self._table_of = {feature.name: feature.table_name for feature in source.spec.sparse}
        seen, self.rows = SeenRows(self._table_of), 0
        for batch in self._batches():
            seen.add(batch.sparse)
            self.rows += batch.num_rows
        self.ids = seen.rows()

    def _batches(self) -> Iterator[Batch]:
        batch_size = int(self._source.config["data"]["eval_batch_size"])
        return iter(evaluation_loader(self._data, self._split, self._source.spec, batch_size, _PROCESS, self._share))

    def read(self, source: ModelSource) -> dict[str, torch.Tensor]:
        """Return the vectors of the rows that are looked up.

        Raises:
            UserError: a file is missing or damaged.
        """
        found = {}
        for name, table in source.tables.items():
            ids, parts = self.ids[name], []
            for start in range(0, table.num_embeddings, _BLOCK_ROWS):
                stop = min(start + _BLOCK_ROWS, table.num_embeddings)
                first, last = torch.searchsorted(ids, torch.tensor([start, stop])).tolist()
                if first < last:
                    parts.append(vectors_of_ids(table, start, stop)[ids[first:last] - start].float())
            found[name] = torch.cat([torch.empty(0, table.embedding_dim), *parts])
        return found

    def model(self, source: ModelSource) -> "SplitModel":
        """Return the served model of a source, for tables of any vectors."""
        return SplitModel(self, source)

    def renumbered(self) -> Iterator[Batch]:
        """Yield the batches with ids that are positions among those that are looked up."""
        ids = {feature: self.ids[table] for feature, table in self._table_of.items()}
        for batch in self._batches():
            yield dataclasses.replace(batch, sparse=renumber(batch.sparse, ids))


class SplitModel:
    """A served model whose tables hold the rows that a split looks up.

    Args:
        split: the split.
        source: the model; its dense layers are loaded.
    """

    def __init__(self, split: MeasuredSplit, source: ModelSource) -> None:
        served = dataclasses.replace(source.spec.with_hidden_dim(None), row_ranges={}, adaptive={})
        spec = with_rows(served, {name: len(ids) for name, ids in split.ids.items()})
        self._split, self._spec = split, spec
        self._model = build_serving_model(spec).requires_grad_(False).eval()
        self._state: dict[str, torch.Tensor] = {name: source.load_dense(name) for name in source.dense}
        self._names = {name: table.state_name for name, table in source.tables.items()}
        weights = source.config.get("train", {}).get("label_weights", {})
        self._label_weights = torch.tensor([float(weights.get(label, 1.0)) for label in spec.labels])

    def _load(self, vectors: Vectors) -> None:
        tables = {self._names[name]: padded(each) for name, each in vectors.items()}
        self._model.load_state_dict({**self._state, **tables})

    @torch.no_grad()
    def logloss(self, vectors: Vectors) -> float:
        """Return the LogLoss of the split; with several labels their sum, each times its ``train.label_weights``.

        Labels that no row of weight above 0 has are not in it; NaN if there is no other.
        """
        self._load(vectors)
        losses, weights = torch.zeros(2, len(self._label_weights), dtype=torch.float64)
        for batch in self._split.renumbered():
            logits, labels, of_rows = self._predicted(batch)
            known = (~labels.isnan()).double() * of_rows
            each = functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
            losses += (each * known).sum(dim=0)
            weights += known.sum(dim=0)
        if not bool(weights.any()):
            return math.nan
        return float((losses / weights.clamp(min=torch.finfo(torch.float64).tiny) * self._label_weights).sum())

    def curvatures(self, vectors: Vectors) -> dict[str, torch.Tensor]:
        """Return by table the mean ``(d, d)`` float64 over rows of p·(1 − p)·J·Jᵀ, J = ∂logit / ∂vector.

        An error δ of one looked-up row of the table costs about δᵀ·M·δ / 2 of LogLoss, with M this matrix. Of a table
        that several features look up, it is their sum, each times its ``lookup_factors``.
        """
        self._load(vectors)
        (collection,) = collections_of(self._model).values()
        captured: list[KeyedTensor] = []

        def capture(_: torch.nn.Module, __: Any, output: KeyedTensor) -> KeyedTensor:
            values = output.values().detach().requires_grad_()
            captured.append(KeyedTensor(output.keys(), output.length_per_key(), values))
            return captured[-1]

        hook = collection.register_forward_hook(capture)
        found = {
            table.name: torch.zeros(table.embedding_dim, table.embedding_dim, dtype=torch.float64)
            for table in self._spec.tables
        }
        table_of = {feature.name: feature.table_name for feature in self._spec.sparse}
        factors = lookup_factors(self._spec)
        try:
            for batch in self._split.renumbered():
                captured.clear()
                logits, _, of_rows = self._predicted(batch)
                for label in range(logits.shape[1]):
                    (slopes,) = torch.autograd.grad(
                        logits[:, label].sum(), captured[0].values(), retain_graph=label + 1 < logits.shape[1]
                    )
                    odds = logits[:, label].detach().double().sigmoid()
                    weights = odds * (1 - odds) * of_rows[:, 0] * self._label_weights[label]
                    parts = KeyedTensor(captured[0].keys(), captured[0].length_per_key(), slopes[: len(odds)].double())
                    for name, slope in parts.to_dict().items():
                        found[table_of[name]].addmm_(slope.T, slope * (factors[name] * weights[:, None]))
        finally:
            hook.remove()
        return {name: total / self._split.rows for name, total in found.items()}

    def _predicted(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits, labels and weights ``(rows, L)`` float64 of a batch, without padding."""
        labels = len(self._label_weights)
        logits = by_row(self._model(batch.dense, batch.sparse), labels)
        found, of_labels, weights = batch.predicted(logits)
        of_rows = torch.ones(len(found)) if weights is None else weights
        return (
            found.reshape(-1, labels).double(),
            of_labels.reshape(-1, labels).double(),
            of_rows.double().reshape(-1, 1),
        )


def lookup_factors(spec: ModelSpec) -> dict[str, float]:
    """Return by feature what turns a cost of errors of its pooled vectors into one of errors of its table's rows.

    It is the feature's share of the lookups of its table, and with mean pooling of bags of L ids also 1/L², since the
    error of a row reaches the pooled vector as an Lth of itself.
    """
    found = {}
    for table in spec.tables:
        lookups = sum(feature.pooling_factor for feature in table.features)
        for feature in table.features:
            share = feature.pooling_factor / lookups if lookups else 0.0
            found[feature.name] = share / max(1.0, feature.pooling_factor) ** 2 if table.takes_mean else share
    return found


def served_vectors(
    ids: torch.Tensor, vectors: torch.Tensor, table: RefittedTable | None, encoding: Encoding
) -> torch.Tensor:
    """Return what a server looks up of rows that are refitted and encoded.

    Args:
        ids: ascending ``(n,)``.
        vectors: theirs in the run ``(n, d)`` float32.
        table: how they are refitted; None for rows of d columns.
        encoding: of the rows.
    """
    if table is None:
        return _encoded(vectors, encoding)
    found = torch.zeros_like(vectors)
    if table.shared is not None:
        kept = sum(each.rows for each in table.ranges if each.width)
        vectors = torch.where((ids >= kept - 1)[:, None], table.shared, vectors)
        ids = ids.clamp(max=kept - 1)
    first = 0
    for each, own in zip(table.ranges, table.directions, strict=True):
        inside = (ids >= first) & (ids < first + each.rows)
        first += each.rows
        if not each.width or not bool(inside.any()):
            continue
        rows = vectors[inside]
        if own is None:
            found[inside] = _encoded(rows, encoding)
        elif is_narrow(each, vectors.shape[1], encoding):
            found[inside] = _encoded((rows.double() @ own.double().T).float(), encoding) @ own
        else:
            found[inside] = _encoded((rows.double() @ own.double().T).float() @ own, encoding)
    return found


def _encoded(rows: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    return encoding.decode(encoding.encode(rows.contiguous())) if len(rows) else rows
