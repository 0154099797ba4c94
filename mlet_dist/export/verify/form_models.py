"""The model of an output of kept rows or of mixed widths, with only the rows that a split looks up."""

import dataclasses
from collections.abc import Mapping

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.data.loading.loader import Batch
from mlet_dist.export.seen_rows import by_feature, padded, with_rows
from mlet_dist.export.served_layout import ServedLayout, ServedTable
from mlet_dist.export.serving.id_mapping import MappedIds, SplitIds
from mlet_dist.export.serving.mixed_tables import MixedWidthCollection
from mlet_dist.export.serving.quantised import build_served, load_dense, table_tensors
from mlet_dist.export.serving.served_model import build_of_layout
from mlet_dist.export.source import ModelSource
from mlet_dist.export.verify.compared_models import ExportedModel, predict_logits
from mlet_dist.export.verify.table_check import CheckedTable, FormRows, StoredOutput
from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import ModelSpec


def form_model(
    served: ModelSpec, source: ModelSource, output: StoredOutput, tables: Mapping[str, CheckedTable]
) -> ExportedModel:
    """Build the model that an output with a layout is meant for; its bags hold positions among the wanted rows."""
    assert output.layout is not None
    found = {name: checked.of_form[output.name] for name, checked in tables.items()}
    spec = with_rows(served, {name: len(rows.numbers) for name, rows in found.items()})
    dense = {name: output.files.load(name) for name in source.dense}
    rows = {
        f"{served.tables_prefix}embedding_bags.{part.name}.weight{suffix}": padded(encoded)
        for name, table in output.layout.tables.items()
        for part, by_suffix in zip(table.parts, found[name].parts, strict=True)
        for suffix, encoded in by_suffix.items()
    }
    predict = predict_logits(_filled(spec, output, output.layout, found, rows, dense))
    positions = {feature.name: found[feature.table_name].positions for feature in served.sparse}

    def predict_from_wanted(batch: Batch, bags: KeyedJaggedTensor) -> torch.Tensor:
        ids = torch.cat([positions[name][of_feature] for name, of_feature in by_feature(bags).items()])
        renumbered = KeyedJaggedTensor(bags.keys(), ids, bags.weights_or_none(), bags.lengths(), stride=bags.stride())
        return predict(batch, renumbered)

    return ExportedModel(output.encoding.name, output.name, "logit", predict_from_wanted)


def _filled(
    spec: ModelSpec,
    output: StoredOutput,
    layout: ServedLayout,
    found: Mapping[str, FormRows],
    rows: Mapping[str, torch.Tensor],
    dense: Mapping[str, torch.Tensor],
) -> torch.nn.Module:
    """Return TorchRec's float or quantised model of kept rows, or that of a package of mixed widths."""
    if layout.form == "kept" and not output.encoding.is_quantised:
        plain = build_serving_model(spec)
        plain.load_state_dict({**rows, **dense})
        return plain
    wanted = _with_wanted_rows(layout, found)
    mixed = layout.form == "mixed"
    model = build_of_layout(spec, wanted, output.encoding) if mixed else build_served(spec, output.encoding)
    load_dense(model, dense)
    for name, tensor in table_tensors(model).items():
        tensor.copy_(rows[name].view(tensor.dtype))
    for module in model.modules():
        if isinstance(module, MixedWidthCollection):
            module.load_projections({name: output.files.load(name) for name in module.projections})
    return MappedIds(SplitIds(spec, wanted), model) if mixed else model


def _with_wanted_rows(layout: ServedLayout, found: Mapping[str, FormRows]) -> ServedLayout:
    """Return the layout of the wanted rows alone, numbered from 0, with one row at least in each part."""
    tables = {}
    for name, table in layout.tables.items():
        numbers = found[name].numbers
        parts = tuple(
            dataclasses.replace(
                part,
                first_row=int(torch.searchsorted(numbers, part.first_row)),
                num_embeddings=max(1, len(next(iter(encoded.values())))),
            )
            for part, encoded in zip(table.parts, found[name].parts, strict=True)
        )
        tables[name] = ServedTable(max(1, len(numbers)), len(numbers), None, table.embedding_dim, parts)
    return dataclasses.replace(layout, tables=tables)
