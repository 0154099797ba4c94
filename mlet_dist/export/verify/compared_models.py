"""The models that `mlet verify` compares, with only the rows of their tables that a split looks up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import fbgemm_gpu  # noqa: F401  # registers the operators of a package's model
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.data.loading.loader import Batch
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.export.export_directory import PACKAGE
from mlet_dist.export.seen_rows import padded, with_rows
from mlet_dist.export.served_layout import ServedLayout
from mlet_dist.export.serving.package import EXPORTED, SCRIPTED
from mlet_dist.export.serving.quantised import build_served, load_dense, table_tensors
from mlet_dist.export.sized_model import SizedSource
from mlet_dist.export.source import ModelSource
from mlet_dist.export.verify.table_check import CheckedTable, StoredOutput
from mlet_dist.models.build import build_serving_model, build_training_model
from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.label_metrics import by_row

Predict = Callable[[Batch, KeyedJaggedTensor], torch.Tensor]
"""(batch, its bags with ids renumbered to the kept rows) -> (rows,) float32, without padding rows.

With several labels (rows, L).
"""


@dataclass(frozen=True)
class ExportedModel:
    """One model of an export.

    Attributes:
        encoding: of its tables.
        of_tables: the output that contains its tables.
        unit: what ``predict`` returns, ``logit`` or ``probability``.
    """

    encoding: str
    of_tables: str
    unit: str
    predict: Predict


def trained_model(source: ModelSource, tables: Mapping[str, CheckedTable]) -> Predict:
    """Build the trained, factorised model, which predicts logits; at a nested width that of d columns, masked."""
    width = source.size.embedding_dim if isinstance(source, SizedSource) and source.size.how == "columns" else None
    # A table with row ranges is read as one of W1 and W2 with as many columns as the ranges have together.
    widths = {name: table.hidden_dim for name, table in source.tables.items()}
    whole = source.whole if isinstance(source, SizedSource) and width is not None else source
    spec = with_rows(whole.spec, {name: len(table.stored) for name, table in tables.items()})
    model = build_training_model(spec, tables_device=torch.device("cpu"), hidden_dims=widths)
    state = {name: whole.load_dense(name) for name in whole.dense}
    for name, table in whole.tables.items():
        rows = padded(tables[name].stored)
        state[table.state_name] = RowOrder((len(rows),)).to_stored(rows)
        if widths[name] is not None:
            projection = torch.eye(table.embedding_dim) if table.projection is None else table.projection
            state[f"{table.tables_prefix}projections.{name}.weight"] = projection
    model.load_state_dict(state)
    return predict_logits(model if width is None else _AtWidth(spec, model, width))


class _AtWidth(torch.nn.Module):
    """A trained model that sees the first columns of all vectors alone."""

    def __init__(self, spec: ModelSpec, model: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.model, self._width, self._nested = model, torch.tensor([width]), NestedWidths.of(spec, model)

    def forward(self, dense: torch.Tensor, bags: KeyedJaggedTensor) -> torch.Tensor:
        assert self._nested is not None
        return self._nested.at_width(self.model, dense, bags, self._width)


def output_model(
    served: ModelSpec, source: ModelSource, output: StoredOutput, tables: Mapping[str, CheckedTable]
) -> ExportedModel:
    """Build TorchRec's float or quantised model, which an output is meant for."""
    spec = with_rows(served, {name: len(table.stored) for name, table in tables.items()})
    dense = {name: output.files.load(name) for name in source.dense}
    rows = {
        f"{source.tables[name].state_name}{suffix}": padded(part)
        for name, checked in tables.items()
        for suffix, part in checked.parts[output.name].items()
    }
    if output.encoding.is_quantised:
        model = build_served(spec, output.encoding)
        load_dense(model, dense)
        for name, tensor in table_tensors(model).items():
            tensor.copy_(rows[name])
    else:
        model = build_serving_model(spec)
        model.load_state_dict(rows | dense)
    return ExportedModel(output.encoding.name, output.name, "logit", predict_logits(model))


def package_models(
    path: Path, encoding: str, layout: ServedLayout | None, outputs: Mapping[str, StoredOutput]
) -> dict[str, ExportedModel]:
    """Load the models of a package, whose files must have been verified, with all of their tables.

    Args:
        path: of the package.
        encoding: of its tables.
        layout: of its tables; None for all rows with d columns.
        outputs: all other outputs.
    """
    of_tables = next(
        name for name, output in outputs.items() if (output.encoding.name, output.layout) == (encoding, layout)
    )
    models = {SCRIPTED: torch.jit.load(path / SCRIPTED), EXPORTED: torch.export.load(path / EXPORTED).module()}
    return {
        f"{PACKAGE}/{name}": ExportedModel(encoding, of_tables, "probability", _predict_probabilities(model))
        for name, model in models.items()
    }


def predict_logits(model: torch.nn.Module) -> Predict:
    """Return the predictions of a model of logits ``(B, 1)``, or ``(B, L)`` for several labels."""
    model.eval()

    def predict(batch: Batch, bags: KeyedJaggedTensor) -> torch.Tensor:
        labels = 1 if batch.labels.dim() == 1 else batch.labels.shape[1]
        return by_row(model(batch.dense, bags), labels)[: batch.num_rows]

    return predict


def _predict_probabilities(model: Callable[..., torch.Tensor]) -> Predict:
    def predict(batch: Batch, _: KeyedJaggedTensor) -> torch.Tensor:
        # Padding rows have no ids, so all ids belong to the other rows.
        lengths = batch.sparse.lengths().view(len(batch.sparse.keys()), -1)[:, : batch.num_rows].contiguous()
        request = [batch.dense[: batch.num_rows], batch.sparse.values(), lengths]
        weights = batch.sparse.weights_or_none()
        return model(*request) if weights is None else model(*request, weights)

    return predict
