"""The optimizer of a run, in three forms.

W1's sharded rows are updated inside backward by fbgemm's fused kernels (``fuse_row_optimizer``). Rows without a fused
kernel, W2 and the dense layers have ordinary torch optimizers (``build_optimizer``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards
from torchrec.distributed import DistributedModelParallel
from torchrec.optim import Adam as FusedAdam
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.embeddings import LazyAdam, StepCountingOptimizer
from mlet_dist.models.tables import row_prefixes, table_prefixes

# fbgemm's default eps is 1e-8 and that of torch's Adagrad 1e-10: rows and dense layers get the same.
_EPS = {"eps": 1e-8}
_BETA1, _BETA2 = 0.9, 0.999
_ADAM = {**_EPS, "betas": (_BETA1, _BETA2)}

_Form = tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]


@dataclass(frozen=True)
class _Rule:
    """An optimizer in three forms: fused in backward, for rows without a fused kernel, for W2 and dense layers."""

    fused: _Form
    rows: _Form
    dense: _Form


_SGD: _Form = (torch.optim.SGD, {})
_ADAGRAD: _Form = (torch.optim.Adagrad, _EPS)
_RULES = {
    "sgd": _Rule(_SGD, _SGD, _SGD),
    "adagrad": _Rule(_ADAGRAD, _ADAGRAD, _ADAGRAD),
    "rowwise_adagrad": _Rule((RowWiseAdagrad, _EPS), (RowWiseAdagrad, _EPS), _ADAGRAD),
    # The fused kernel takes beta1 and beta2; TorchRec also passes on arguments it does not know, as torch's `betas`.
    "adam": _Rule(
        (FusedAdam, {**_EPS, "beta1": _BETA1, "beta2": _BETA2}), (LazyAdam, _ADAM), (torch.optim.Adam, _ADAM)
    ),
}


def fuse_row_optimizer(model: nn.Module, config: OptimizerConfig) -> None:
    """Have fbgemm update every W1 inside backward, where it has a kernel for that; call this before sharding."""
    kind, arguments = _RULES[config.name].fused
    prefixes = row_prefixes(model)
    rows = [parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)]
    apply_optimizer_in_backward(kind, rows, {**arguments, "lr": _or_common(config.rows_learning_rate, config)})


def build_optimizer(model: DistributedModelParallel, config: OptimizerConfig) -> CombinedOptimizer:
    """Return all optimizers of a sharded model as one, with state keyed by parameter name.

    Rows without a fused kernel, such as those of tables too small to be sharded, are updated here by the same rule and
    at the same learning rate. Call ``zero_grad`` before the forward pass, where fused kernels read their learning rate.
    """
    rule, prefixes = _RULES[config.name], row_prefixes(model)
    rows: dict[str, torch.Tensor] = {}
    projections: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        if name.startswith(prefixes):
            rows[name] = parameter
        elif name.startswith(tuple(f"{prefix}projections." for prefix in table_prefixes(model))):
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
            optimizers.append(KeyedOptimizerWrapper(parameters, _factory(_dense_form(rule, parameters), rate)))
            if config.name == "adam":
                _make_state(optimizers[-1])
    return CombinedOptimizer(optimizers)


def optimizer_state(optimizer: CombinedOptimizer) -> dict[str, dict[str, Any]]:
    """Return parameter name -> state name -> tensor, with names and shapes that do not depend on the sharding.

    The states are ``sum`` for Adagrad, of shape ``(n,)`` for rows under row-wise Adagrad; ``exp_avg``, ``exp_avg_sq``
    and ``step`` for Adam; none for SGD. The tensors are the optimizer's own, so loading into them restores it. Learning
    rates come from the config and are not included. A collective call.
    """
    named: dict[str, dict[str, Any]] = {}
    for _, part in optimizer.optimizers:
        for parameter, states in part.state_dict()["state"].items():
            # fbgemm calls it `<table>.momentum1`, torch calls it `sum`.
            found = {name.rpartition(".")[2]: tensor for name, tensor in states.items()}
            if "momentum1" in found:
                found["exp_avg" if "exp_avg_sq" in found else "sum"] = found.pop("momentum1")
            # Only torch counts the steps of Adagrad, and they do not change its update.
            kept = ("exp_avg", "exp_avg_sq", "step") if "exp_avg" in found else ("sum",)
            found = {name: tensor for name, tensor in found.items() if name in kept}
            if isinstance(part, _RowsOptimizer):
                found = {name: part.as_fused(parameter, tensor) for name, tensor in found.items()}
            if found:
                named[parameter] = found
    return named


class _RowsOptimizer(KeyedOptimizerWrapper):
    """The optimizer of rows that are updated after backward, with state in the layout of fused kernels."""

    def __init__(
        self,
        rows: Mapping[str, torch.Tensor],
        factory: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
        sharded: Mapping[str, ShardedTensor],
    ) -> None:
        super().__init__(rows, factory)
        self._sharded = sharded

    def as_fused(self, parameter: str, state: torch.Tensor) -> Any:
        """Return a per-row state as ``(n,)`` instead of torchrec's ``(n, 1)``, sharded as its weight is."""
        if state.dim() == 2 and state.shape[1] == 1:
            state = state.view(-1)
        weight = self._sharded.get(parameter)
        if weight is None or state.dim() == 0:
            return state
        shards = [Shard(state, each.metadata) for each in weight.local_shards()]
        return init_from_local_shards(shards, *weight.size(), process_group=weight._process_group)


def _dense_form(rule: _Rule, parameters: Mapping[str, torch.Tensor]) -> _Form:
    """Return Adagrad and Adam on a CPU with torch's kernel for all parameters at once, which is not its default there.

    The default takes several operations for each parameter and reads its step counter: 2.5 and 3 times as long for the
    weights of a DLRM and 26 W2. SGD has one operation for each parameter, and no counter. The kernel ignores strides.
    """
    kind, arguments = rule.dense
    fits = all(each.device.type == "cpu" and each.is_contiguous() for each in parameters.values())
    return (kind, {**arguments, "fused": True}) if fits and kind is not torch.optim.SGD else rule.dense


def _factory(form: _Form, rate: float) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    kind, arguments = form
    return lambda parameters: kind(parameters, lr=rate, **arguments)


def _make_state(optimizer: KeyedOptimizer) -> None:
    """Create the state that torch's Adam creates in its first step, so that a checkpoint can be loaded into it."""
    optimizer.init_state()
    for states in optimizer.state.values():
        states["step"].zero_()
    optimizer.zero_grad()


def _or_common(rate: float | None, config: OptimizerConfig) -> float:
    return config.learning_rate if rate is None else rate
