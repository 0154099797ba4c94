"""Where the tables of a quantised output lie when TorchRec serves them sharded."""

from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.fused_params import (
    FUSED_PARAM_BOUNDS_CHECK_MODE,
    FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS,
    FUSED_PARAM_REGISTER_TBE_BOOL,
)
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.quant_embeddingbag import QuantEmbeddingBagCollectionSharder
from torchrec.distributed.types import BoundsCheckMode
from torchrec.inference.modules import shard_quant_model

from mlet_dist.errors import UserError
from mlet_dist.export.encoding import Encoding
from mlet_dist.export.serving.quantised import build_served
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.models.spec import ModelSpec


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
