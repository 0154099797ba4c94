"""One optimizer in two forms: fused into backward for the sharded rows, torch's own for everything else."""

from collections.abc import Callable
from typing import Any

import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.models.dlrm import DLRM
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mlet_dist.config import OptimizerConfig
from mlet_dist.models.dlrm import TABLES_PREFIX

_OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    # fbgemm's default eps is 1e-8 and torch's 1e-10: rows and dense layers get the same.
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
}
# fbgemm's name of a state -> torch's. What has no name here, torch's count of steps, does not change the update.
_STATES = {"momentum1": "sum", "sum": "sum"}


def fuse_row_optimizer(model: DLRM, config: OptimizerConfig) -> None:
    """Have every W1 updated inside backward; call it before sharding."""
    kind, arguments = _OPTIMIZERS[config.name]
    rows = model.sparse_arch.embedding_bag_collection.embedding_bags.parameters()
    apply_optimizer_in_backward(kind, rows, {**arguments, "lr": _or_common(config.rows_learning_rate, config)})


def build_optimizer(model: DistributedModelParallel, config: OptimizerConfig) -> CombinedOptimizer:
    """All optimizers of a sharded model as one, with state keyed by parameter name.

    Rows of tables too small to be sharded have no fused kernel; they are stepped here, at the rows' learning rate.
    """
    kind, arguments = _OPTIMIZERS[config.name]
    groups: dict[float, dict[str, torch.Tensor]] = {}
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        if name.startswith(f"{TABLES_PREFIX}embedding_bags."):
            rate = _or_common(config.rows_learning_rate, config)
        elif name.startswith(f"{TABLES_PREFIX}projections."):
            rate = _or_common(config.projections_learning_rate, config)
        else:
            rate = config.learning_rate
        groups.setdefault(rate, {})[name] = parameter
    stepped = [
        KeyedOptimizerWrapper(parameters, lambda params, rate=rate: kind(params, lr=rate, **arguments))
        for rate, parameters in groups.items()
    ]
    return CombinedOptimizer([model.fused_optimizer, *stepped])


def optimizer_state(optimizer: KeyedOptimizer) -> dict[str, dict[str, Any]]:
    """Parameter name -> state name -> tensor, by the same names whether a table is sharded or replicated.

    The tensors are the optimizer's own: what is loaded into them is loaded into it. Learning rates are not among them;
    they are the config's.
    """
    named: dict[str, dict[str, Any]] = {}
    for parameter, states in optimizer.state_dict()["state"].items():
        # fbgemm says `<table>.momentum1`, torch says `sum`.
        short = {state.rpartition(".")[2]: tensor for state, tensor in states.items()}
        found = {_STATES[state]: tensor for state, tensor in short.items() if state in _STATES}
        if found:
            named[parameter] = found
    return named


def _or_common(rate: float | None, config: OptimizerConfig) -> float:
    return config.learning_rate if rate is None else rate
