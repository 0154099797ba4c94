"""One optimizer in several forms: fused into backward for the sharded rows, an ordinary one for everything else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards
from torchrec.distributed import DistributedModelParallel
from torchrec.models.dlrm import DLRM
from torchrec.optim import Adam as FusedAdam
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.embeddings import LazyAdam, StepCountingOptimizer
from mlet_dist.models.dlrm import TABLES_PREFIX

# fbgemm's default eps is 1e-8 and that of torch's Adagrad 1e-10: rows and dense layers get the same.
_EPS = {"eps": 1e-8}
_BETA1, _BETA2 = 0.9, 0.999
_ADAM = {**_EPS, "betas": (_BETA1, _BETA2)}

_Form = tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]


@dataclass(frozen=True)
class _Rule:
    """Three forms of an optimizer: in backward, for rows without a fused kernel, and for W2 and dense layers."""

    fused: _Form
    rows: _Form
    dense: _Form


_SGD: _Form = (torch.optim.SGD, {})
_ADAGRAD: _Form = (torch.optim.Adagrad, _EPS)
_RULES = {
    "sgd": _Rule(_SGD, _SGD, _SGD),
    "adagrad": _Rule(_ADAGRAD, _ADAGRAD, _ADAGRAD),
    "rowwise_adagrad": _Rule((RowWiseAdagrad, _EPS), (RowWiseAdagrad, _EPS), _ADAGRAD),
    # The fused kernel takes beta1 and beta2; TorchRec hands it what it does not know, such as torch's `betas`, as well.
    "adam": _Rule(
        (FusedAdam, {**_EPS, "beta1": _BETA1, "beta2": _BETA2}), (LazyAdam, _ADAM), (torch.optim.Adam, _ADAM)
    ),
}


def fuse_row_optimizer(model: DLRM, config: OptimizerConfig) -> None:
    """Have every W1 updated inside backward, where fbgemm has such a kernel; call it before sharding."""
    kind, arguments = _RULES[config.name].fused
    rows = model.sparse_arch.embedding_bag_collection.embedding_bags.parameters()
    apply_optimizer_in_backward(kind, rows, {**arguments, "lr": _or_common(config.rows_learning_rate, config)})


def build_optimizer(model: DistributedModelParallel, config: OptimizerConfig) -> CombinedOptimizer:
    """All optimizers of a sharded model as one, with state keyed by parameter name.

    Rows that have no fused kernel, such as those of tables too small to be sharded, are stepped here by the same rule
    and at the same rate. Call ``zero_grad`` before the forward pass.
    """
    rule = _RULES[config.name]
    rows: dict[str, torch.Tensor] = {}
    projections: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        if name.startswith(f"{TABLES_PREFIX}embedding_bags."):
            rows[name] = parameter
        elif name.startswith(f"{TABLES_PREFIX}projections."):
            projections[name] = parameter
        else:
            dense[name] = parameter
    fused: KeyedOptimizer = model.fused_optimizer
    if config.name == "adam":
        fused = StepCountingOptimizer(fused, model)
    optimizers = [fused]
    if rows:
        rate = _or_common(config.rows_learning_rate, config)
        sharded = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, ShardedTensor)}
        optimizers.append(_RowsOptimizer(rows, _factory(rule.rows, rate), sharded))
    for parameters, rate in (
        (projections, _or_common(config.projections_learning_rate, config)),
        (dense, config.learning_rate),
    ):
        if parameters:
            optimizers.append(KeyedOptimizerWrapper(parameters, _factory(rule.dense, rate)))
            if config.name == "adam":
                _make_state(optimizers[-1])
    return CombinedOptimizer(optimizers)


def optimizer_state(optimizer: CombinedOptimizer) -> dict[str, dict[str, Any]]:
    """Parameter name -> state name -> tensor: the same names and shapes whether a table is sharded or replicated.

    ``sum`` for Adagrad, of shape ``(n,)`` for rows of the row-wise one; ``exp_avg``, ``exp_avg_sq`` and ``step`` for
    Adam; nothing for SGD. The tensors are the optimizer's own: what is loaded into them is loaded into it. Learning
    rates are not among them; they are the config's. A collective call.
    """
    named: dict[str, dict[str, Any]] = {}
    for _, part in optimizer.optimizers:
        for parameter, states in part.state_dict()["state"].items():
            # fbgemm says `<table>.momentum1`, torch says `sum`.
            found = {name.rpartition(".")[2]: tensor for name, tensor in states.items()}
            if "momentum1" in found:
                found["exp_avg" if "exp_avg_sq" in found else "sum"] = found.pop("momentum1")
            # The step of Adagrad, which only torch counts, does not change its update.
            kept = ("exp_avg", "exp_avg_sq", "step") if "exp_avg" in found else ("sum",)
            found = {name: tensor for name, tensor in found.items() if name in kept}
            if isinstance(part, _RowsOptimizer):
                found = {name: part.as_fused(parameter, tensor) for name, tensor in found.items()}
            if found:
                named[parameter] = found
    return named


class _RowsOptimizer(KeyedOptimizerWrapper):
    """Rows that are stepped after backward, with their state as the fused kernels would hold it."""

    def __init__(
        self,
        rows: Mapping[str, torch.Tensor],
        factory: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
        sharded: Mapping[str, ShardedTensor],
    ) -> None:
        super().__init__(rows, factory)
        self._sharded = sharded

    def as_fused(self, parameter: str, state: torch.Tensor) -> Any:
        """A state by row ``(n,)`` instead of torchrec's ``(n, 1)``, and sharded as its weight is."""
        if state.dim() == 2 and state.shape[1] == 1:
            state = state.view(-1)
        weight = self._sharded.get(parameter)
        if weight is None or state.dim() == 0:
            return state
        shards = [Shard(state, each.metadata) for each in weight.local_shards()]
        return init_from_local_shards(shards, *weight.size(), process_group=weight._process_group)


def _factory(form: _Form, rate: float) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    kind, arguments = form
    return lambda parameters: kind(parameters, lr=rate, **arguments)


def _make_state(optimizer: KeyedOptimizer) -> None:
    """Make the state that torch's Adam makes in its first step: a checkpoint is loaded into what is there."""
    optimizer.init_state()
    for states in optimizer.state.values():
        states["step"].zero_()
    optimizer.zero_grad()


def _or_common(rate: float | None, config: OptimizerConfig) -> float:
    return config.learning_rate if rate is None else rate
