"""The model that serves an output of any form: the quantised model behind a mapping of the data set's ids."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType

from mlet_dist.export.encoding import Encoding
from mlet_dist.export.served_layout import ServedLayout, ServedPart, ServedTable
from mlet_dist.export.serving.id_mapping import KeptIds, MappedIds, SplitIds
from mlet_dist.export.serving.mixed_tables import MixedWidthCollection
from mlet_dist.export.serving.quantised import build_served
from mlet_dist.models.build import Collections, build_around
from mlet_dist.models.spec import ModelSpec


def layout_of(spec: ModelSpec) -> ServedLayout:
    """Return the layout of an output of all rows."""
    tables = {}
    for table in spec.tables:
        n, d = table.num_embeddings, table.embedding_dim
        tables[table.name] = ServedTable(n, n, None, d, (ServedPart(table.name, 0, n, d),))
    return ServedLayout("all", tables)


def spec_of_layout(spec: ModelSpec, layout: ServedLayout) -> ModelSpec:
    """Return the spec of the model whose tables each have one part, with the rows of that part."""
    rows = {name: table.parts[0].num_embeddings for name, table in layout.tables.items()}
    sparse = tuple(dataclasses.replace(each, num_embeddings=rows[each.table_name]) for each in spec.sparse)
    return dataclasses.replace(spec, sparse=sparse)


def build_of_layout(spec: ModelSpec, layout: ServedLayout, encoding: Encoding) -> nn.Module:
    """Return an uninitialised model on the CPU, to be filled as that of ``build_served`` and by ``load_projections``.

    Its ids are those that ``with_ids_mapped`` turns the ids of the data set into.
    """
    if layout.form != "mixed":
        return build_served(spec_of_layout(spec, layout), encoding)
    tables = MixedWidthCollection(spec, layout, DataType(encoding.name.upper()))
    return build_around(Collections(tables), spec).requires_grad_(False).eval()


def with_ids_mapped(
    model: nn.Module, spec: ModelSpec, layout: ServedLayout, kept_ids: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Return a model of ``build_of_layout``, or its trace, as one that takes the ids of the data set.

    Args:
        kept_ids: the ids of kept rows by state name, for tables that have any.
    """
    if layout.form == "mixed":
        model = MappedIds(SplitIds(spec, layout), model)
    if layout.form != "all":
        tables = [layout.tables[feature.table_name] for feature in spec.sparse]
        model = MappedIds(KeptIds([feature.name for feature in spec.sparse], tables, kept_ids), model)
    return model
