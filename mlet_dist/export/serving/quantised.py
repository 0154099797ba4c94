"""The quantised model for serving: access to its encoded tables, and their sharding plan for serving."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed.fused_params import (
    FUSED_PARAM_BOUNDS_CHECK_MODE,
    FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS,
    FUSED_PARAM_REGISTER_TBE_BOOL,
)
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.quant_embeddingbag import QuantEmbeddingBagCollectionSharder
from torchrec.distributed.types import BoundsCheckMode
from torchrec.inference.modules import shard_quant_model
from torchrec.modules.embedding_configs import DataType
from torchrec.tensor_types import UInt4Tensor

from mlet_dist.errors import UserError
from mlet_dist.export.encoding import Encoding
from mlet_dist.models.build import build_quantised_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.models.tables import table_prefixes

_CPU = torch.device("cpu")


def build_served(spec: ModelSpec, encoding: Encoding, device: torch.device = _CPU) -> nn.Module:
    """Return an uninitialised model with encoded tables, to be filled by ``table_tensors`` and ``load_dense``."""
    return build_quantised_model(spec, DataType(encoding.name.upper()), device)


def table_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return views of the tables' memory by state name: values uint8 (also for fp32), scales and biases float16."""
    state, (prefix,) = model.state_dict(), table_prefixes(model)
    named = {name.replace(f"{prefix}parts.", prefix, 1): tensor for name, tensor in state.items()}
    return {
        # TorchRec presents int4 values with a column each.
        name: tensor.view(torch.uint8) if isinstance(tensor, UInt4Tensor) else tensor
        for name, tensor in named.items()
        if name.startswith(f"{prefix}embedding_bags.")
    }


def dense_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of the layers other than tables, in place, by state name."""
    prefixes = table_prefixes(model)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}


def load_dense(model: nn.Module, dense: Mapping[str, torch.Tensor]) -> None:
    """Fill ``dense_tensors`` from tensors by state name; raise KeyError if one is missing."""
    for name, tensor in dense_tensors(model).items():
        tensor.copy_(dense[name])


@dataclass(frozen=True)
class Serving:
    """The devices of a server.

    Attributes:
        ranks: number of devices, all of them in one process as TorchRec's inference requires.
        device: ``cpu`` or ``cuda``.
    """

    ranks: int
    device: str


def plan_serving(spec: ModelSpec, encoding: Encoding, serving: Serving) -> dict[str, Any]:
    """Return the plan of TorchRec's ``shard_quant_model`` as JSON: sharding type, kernel, ranks and shards by table.

    All tables are sharded table_wise, the only sharding type that TorchRec plans for inference. Planning allocates no
    memory for them.

    Raises:
        UserError: they do not fit into the devices' memory as TorchRec estimates it.
    """
    model = build_served(spec, encoding, torch.device("meta"))
    fused_params = {
        FUSED_PARAM_REGISTER_TBE_BOOL: True,
        FUSED_PARAM_BOUNDS_CHECK_MODE: BoundsCheckMode.NONE,
        # TorchRec 1.8 fails for fp16 tables, which have no scales.
        FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: encoding.bits < 16,
    }
    try:
        _, plan = shard_quant_model(
            model,
            world_size=serving.ranks,
            compute_device=serving.device,
            sharding_device="meta",
            sharders=[QuantEmbeddingBagCollectionSharder(fused_params=fused_params)],
        )
    except PlannerError as error:
        cause = " ".join(str(error).split())
        raise UserError(
            f"--serving-ranks {serving.ranks}: TorchRec finds no plan for {encoding.name}: {cause[:200]}"
        ) from None
    (tables,) = plan.plan.values()
    return {
        "ranks": serving.ranks,
        "device": serving.device,
        "tables": {
            name: {
                "sharding_type": each.sharding_type,
                "compute_kernel": each.compute_kernel,
                "ranks": each.ranks,
                "shards": [
                    {
                        "offsets": list(shard.shard_offsets),
                        "sizes": list(shard.shard_sizes),
                        "placement": str(shard.placement),
                    }
                    for shard in each.sharding_spec.shards
                ],
            }
            for name, each in tables.items()
        },
    }
