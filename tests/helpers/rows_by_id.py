"""Full tensors of a model's state dict, with the rows of tables by id rather than as they are stored."""

from collections.abc import Mapping

import torch

from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec


def row_orders(spec: ModelSpec) -> dict[str, RowOrder]:
    """Return the order of the stored rows of each W1 that has one, by state name."""
    meta = torch.device("meta")
    stored = build_training_model(spec, meta, dense_device=meta).sparse_arch.embedding_bag_collection.row_tables()
    names = {f"{TABLES_PREFIX}embedding_bags.{table.name}.weight": table.row_order for table in stored}
    return {name: order for name, order in names.items() if order is not None}


def model_by_id(state: Mapping[str, torch.Tensor], spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return the state dict of a DLRM with the rows of W1 by id."""
    orders = row_orders(spec)
    return {name: orders[name].from_stored(each) if name in orders else each for name, each in state.items()}
