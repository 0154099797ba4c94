"""TorchRec's quantised DLRM: its tables as an export stores them, and their sharding plan for serving."""

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
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import DataType
from torchrec.tensor_types import UInt4Tensor

from mlet_dist.errors import UserError
from mlet_dist.export.encoding import Encoding
from mlet_dist.models.dlrm import TABLES_PREFIX, build_quantised_dlrm
from mlet_dist.models.spec import ModelSpec

_CPU = torch.device("cpu")


def build_served(spec: ModelSpec, encoding: Encoding, device: torch.device = _CPU) -> DLRM:
    """The DLRM whose tables hold rows of an encoding, to be filled by ``table_tensors`` and ``load_dense``."""
    return build_quantised_dlrm(spec, DataType(encoding.name.upper()), device)


def table_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """By state name, views of the tables' memory: values uint8 (for fp32, too), scales and biases float16."""
    return {
        # TorchRec shows four bits as if each had a column of its own.
        name: tensor.view(torch.uint8) if isinstance(tensor, UInt4Tensor) else tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{TABLES_PREFIX}embedding_bags.")
    }


def load_dense(model: nn.Module, dense: Mapping[str, torch.Tensor]) -> None:
    """Fill all that is no table from tensors by state name; KeyError where one is missing."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dense[name])


@dataclass(frozen=True)
class Serving:
    """What a server has.

    Attributes:
        ranks: devices of one process, which is how TorchRec serves.
        device: ``cpu`` or ``cuda``.
    """

    ranks: int
    device: str


def plan_serving(spec: ModelSpec, encoding: Encoding, serving: Serving) -> dict[str, Any]:
    """TorchRec's ``shard_quant_model`` plan, as JSON: by table, its sharding type, kernel, ranks and shards.

    Tables are whole on one rank each, which is all that TorchRec plans by itself for inference. The tables take no
    memory here.

    Raises:
        UserError: they do not fit, by what TorchRec knows of the device.
    """
    model = build_served(spec, encoding, torch.device("meta"))
    fused_params = {
        FUSED_PARAM_REGISTER_TBE_BOOL: True,
        FUSED_PARAM_BOUNDS_CHECK_MODE: BoundsCheckMode.NONE,
        # TorchRec 1.8 stumbles over fp16 tables here, which have no scales.
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
        said = " ".join(str(error).split())
        raise UserError(
            f"--serving-ranks {serving.ranks}: TorchRec finds no plan for {encoding.name}: {said[:200]}"
        ) from None
    tables = plan.plan[TABLES_PREFIX.removesuffix(".")]
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
