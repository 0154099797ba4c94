"""The memory of the layers that every rank holds, computed from their sizes alone, before torch is imported."""

from collections.abc import Sequence
from itertools import pairwise

from mlet_dist.config.config_file import Config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec

_FLOAT_BYTES = 4
_STATES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2}  # of the optimizer, for each weight
_GB = 1e9


def dense_parameters(spec: ModelSpec) -> dict[str, int]:
    """Return the number of weights that every rank holds, by the setting that decides most of it.

    Of a model of ``model.builder`` only those of W2 are known.
    """
    model, d, features, dense = spec.model, spec.model.embedding_dim, len(spec.sparse), len(spec.dense)
    found = {"model.hidden_dim": sum(table.embedding_dim * (table.hidden_dim or 0) for table in spec.tables)}
    if model.builder is not None:
        return found
    of_tables = spec.embedding_dims
    width = sum(of_tables[each.table_name] for each in spec.sparse)
    if model.name == "two_tower":
        query = set(model.query_features or ())
        query_width = sum(of_tables[each.table_name] for each in spec.sparse if each.name in query)
        widths = (dense + query_width, width - query_width)
        return found | {"model.top_mlp": sum(_mlp([width, *model.top_mlp]) for width in widths)}
    vectors = d + width
    found["model.bottom_mlp"] = _mlp([dense, *model.bottom_mlp, d])
    interaction = d + features + features * (features - 1) // 2
    if model.name == "dlrm_dcn":
        found["model.cross_rank"] = model.cross_layers * vectors * (2 * model.cross_rank + 1)
        interaction = vectors
    elif model.name == "deepfm":
        found["model.fm_dim"] = _mlp([vectors, model.fm_dim])
        interaction = d + model.fm_dim + 1
    return found | {"model.top_mlp": _mlp([interaction, *model.top_mlp, len(spec.labels)])}


def check_dense_memory(
    config: Config, spec: ModelSpec, ranks: int, world_size: int, available: int, on_cuda: bool
) -> None:
    """Check that this machine can hold the dense layers and W2, before anything is allocated.

    The estimate is a lower bound: weights, and on a CPU also their gradients, the optimizer's state and the outputs of
    the layers. On CUDA the weights alone are in host memory, where they are drawn.

    Args:
        ranks: on this machine.
        world_size: of the whole job.
        available: bytes of host memory.
        on_cuda: whether the ranks train on CUDA devices.

    Raises:
        UserError: the memory does not suffice; the message names the setting that needs most of it.
    """
    copies = 1 if on_cuda else 2 + _STATES[config.optimizer.name]
    needed = {key: copies * _FLOAT_BYTES * count for key, count in dense_parameters(spec).items()}
    if not on_cuda:
        local_batch_size = config.data.batch_size // max(1, world_size)
        needed["data.batch_size"] = (
            2 * _FLOAT_BYTES * _outputs(spec.model) * spec.model.copies_of_rows * local_batch_size
        )
    total = ranks * sum(needed.values())
    if total > available:
        key = max(needed, key=lambda each: needed[each])
        of_ranks = "" if ranks == 1 else f" for {ranks} ranks"
        raise UserError(
            f"{key}: the dense layers and W2 need at least {total / _GB:,.2f} GB of memory{of_ranks}, most of it for "
            f"{key}, and {available / _GB:,.2f} GB are available here; use smaller layers or batches, fewer ranks on "
            "this machine, or more memory"
        )


def _outputs(model: ModelConfig) -> int:
    """Return the outputs of all hidden layers for a row; 0 for a network of ``model.builder``, which is not known."""
    if model.builder is not None:
        return 0
    return 2 * sum(model.top_mlp) if model.name == "two_tower" else sum(model.bottom_mlp) + sum(model.top_mlp)


def _mlp(sizes: Sequence[int]) -> int:
    return sum(inputs * outputs + outputs for inputs, outputs in pairwise(sizes))
