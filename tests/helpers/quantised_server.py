"""A TorchRec server of quantised tables that cannot import mlet_dist, run by the tests as a program of its own.

    python quantised_server.py EXPORT PARQUET OUT

loads each quantised output of an export into TorchRec's quantised DLRM, unsharded and sharded over two devices of this
process by the plan in the manifest. It saves the logits of all rows of a Parquet file: {output: {unsharded, sharded}}.
"""

import json
import sys
from pathlib import Path

sys.modules["mlet_dist"] = None  # type: ignore[assignment]  # importing it now raises ModuleNotFoundError

import pyarrow.parquet as pq
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.fused_params import FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.distributed.quant_embeddingbag import QuantEmbeddingBagCollectionSharder
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.inference.modules import quantize_inference_model, shard_quant_model
from torchrec.models.dlrm import DLRM
from torchrec.quant.embedding_modules import quant_prep_enable_quant_state_dict_split_scale_bias_for_types
from torchrec.tensor_types import UInt4Tensor

DTYPES = {"fp16": torch.float16, "int8": torch.int8, "int4": torch.quint4x2}


def build(manifest: dict, output: str, device: str) -> torch.nn.Module:
    names = [table["name"] for table in manifest["tables"]]
    sizes = [table["num_embeddings"] for table in manifest["tables"]]
    layers = manifest["model"]["model"]
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=n, embedding_dim=layers["embedding_dim"], feature_names=[name])
        for name, n in zip(names, sizes, strict=True)
    ]
    model = DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables, device=torch.device(device)),
        dense_in_features=len(manifest["model"]["dense"]),
        dense_arch_layer_sizes=[*layers["bottom_mlp"], layers["embedding_dim"]],
        over_arch_layer_sizes=[*layers["top_mlp"], 1],
    )
    quant_prep_enable_quant_state_dict_split_scale_bias_for_types(model, [EmbeddingBagCollection])
    return quantize_inference_model(model, quantization_dtype=DTYPES[output])


def load(model: torch.nn.Module, checkpoint: Path) -> None:
    """Fill the model's weights in place; the buffers of TorchRec's kernels are skipped."""
    state = {
        name: tensor.view(torch.uint8) if isinstance(tensor, UInt4Tensor) else tensor
        for name, tensor in model.state_dict().items()
        if ".tbes." not in name
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)


def plan_of(plan: dict) -> ShardingPlan:
    tables = EmbeddingModuleShardingPlan()
    for name, each in plan["tables"].items():
        shards = [ShardMetadata(s["offsets"], s["sizes"], s["placement"]) for s in each["shards"]]
        tables[name] = ParameterSharding(
            each["sharding_type"], each["compute_kernel"], each["ranks"], EnumerableShardingSpec(shards)
        )
    return ShardingPlan({"sparse_arch.embedding_bag_collection": tables})


def main(export: Path, parquet: Path, out: Path) -> None:
    set_propogate_device(True)  # otherwise TorchRec's sharded inference requires CUDA
    manifest = json.loads((export / "manifest.json").read_text())
    rows = pq.read_table(parquet)
    names = [table["name"] for table in manifest["tables"]]
    dense = torch.stack([torch.tensor(rows[name].to_pylist()) for name in manifest["model"]["dense"]], dim=1)
    ids = torch.cat([torch.tensor(rows[name].to_pylist()) for name in names])
    sparse = KeyedJaggedTensor(names, ids, lengths=torch.ones(len(ids), dtype=torch.int64))
    logits: dict[str, dict[str, torch.Tensor]] = {}
    for output in DTYPES:
        described = manifest["outputs"][output]
        checkpoint = export / described["directory"]
        unsharded = build(manifest, output, "cpu")
        load(unsharded, checkpoint)
        # The full tables of the sharded model are never in memory.
        sharder = QuantEmbeddingBagCollectionSharder(
            fused_params={FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: output != "fp16"}
        )
        sharded, _ = shard_quant_model(
            build(manifest, output, "meta"),
            world_size=described["plan"]["ranks"],
            compute_device="cpu",
            sharding_device="cpu",
            sharders=[sharder],
            sharding_plan=plan_of(described["plan"]),
        )
        load(sharded, checkpoint)
        with torch.no_grad():
            logits[output] = {"unsharded": unsharded(dense, sparse), "sharded": sharded(dense, sparse)}
    torch.save(logits, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
