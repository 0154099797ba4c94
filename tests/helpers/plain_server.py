"""A TorchRec server that cannot import mlet_dist, run by the tests as a program of its own.

    torchrun plain_server.py JOBS

runs the jobs of a JSON file on any number of ranks. Each job loads an export into a plain DLRM and saves the logits of
all rows of a Parquet file.

    export, parquet, out    paths
    sharding                table_wise, row_wise, column_wise, planner (TorchRec's choice), or null for none
    reader                  dcp; dcp_safetensors (torch's reader of safetensors); safetensors (the files by their index)
"""

import json
import os
import sys
from pathlib import Path

sys.modules["mlet_dist"] = None  # type: ignore[assignment]  # importing it now raises ModuleNotFoundError

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM


def plan_of(kind: str, model: DLRM) -> ShardingPlan:
    """Return a plan with the same sharding type for every table."""
    world_size = dist.get_world_size()
    tables = model.sparse_arch.embedding_bag_collection
    shardings = {}
    for number, config in enumerate(tables.embedding_bag_configs()):
        shardings[config.name] = {
            "table_wise": table_wise(rank=number % world_size),
            "row_wise": row_wise(),
            "column_wise": column_wise(ranks=list(range(world_size))),
        }[kind]
    plan = construct_module_sharding_plan(
        tables, shardings, EmbeddingBagCollectionSharder(), world_size, world_size, device_type="cpu"
    )
    return ShardingPlan({"sparse_arch.embedding_bag_collection": plan})


def serve_one(export: Path, parquet: Path, out: Path, sharding: str | None, reader: str) -> None:
    manifest = json.loads((export / "manifest.json").read_text())
    tables = [
        EmbeddingBagConfig(
            name=table["name"],
            num_embeddings=table["num_embeddings"],
            embedding_dim=table["embedding_dim"],
            feature_names=[table["name"]],
        )
        for table in manifest["tables"]
    ]
    layers = manifest["model"]["model"]
    model = DLRM(
        embedding_bag_collection=EmbeddingBagCollection(
            tables, device=torch.device("cpu" if sharding is None else "meta")
        ),
        dense_in_features=len(manifest["model"]["dense"]),
        dense_arch_layer_sizes=[*layers["bottom_mlp"], layers["embedding_dim"]],
        over_arch_layer_sizes=[*layers["top_mlp"], 1],
    )
    served = model
    if sharding is not None:
        plan = None if sharding == "planner" else plan_of(sharding, model)
        served = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan)
    state = served.state_dict()
    if reader == "dcp":
        dcp.load(state, checkpoint_id=export / manifest["outputs"]["dcp"]["directory"])
    elif reader == "dcp_safetensors":
        directory = export / manifest["outputs"]["safetensors"]["directory"]
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(directory)))
    else:
        directory = export / manifest["outputs"]["safetensors"]["directory"]
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        files = {file: load_file(directory / file) for file in set(index.values())}
        state = {name: files[file][name] for name, file in index.items()}
    served.load_state_dict(state)

    rows = pq.read_table(parquet)
    names = [table.name for table in tables]
    dense = torch.stack([torch.tensor(rows[name].to_pylist()) for name in manifest["model"]["dense"]], dim=1)
    ids = torch.cat([torch.tensor(rows[name].to_pylist()) for name in names])
    sparse = KeyedJaggedTensor(names, ids, lengths=torch.ones(len(ids), dtype=torch.int64))
    with torch.no_grad():
        logits = served(dense, sparse)
    if dist.get_rank() == 0:
        shards = {
            name.split(".")[-2]: [tuple(shard.shard_sizes) for shard in tensor.metadata().shards_metadata]
            for name, tensor in served.state_dict().items()
            if isinstance(tensor, ShardedTensor)
        }
        torch.save({"logits": logits.squeeze(-1), "shards": shards}, out)


def main(jobs: Path) -> None:
    dist.init_process_group("gloo")
    for job in json.loads(jobs.read_text()):
        serve_one(Path(job["export"]), Path(job["parquet"]), Path(job["out"]), job["sharding"], job["reader"])
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "mlet_dist" not in os.environ.get("PYTHONPATH", "")
    main(Path(sys.argv[1]))
