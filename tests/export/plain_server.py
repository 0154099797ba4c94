"""A TorchRec server that has never heard of mlet_dist: run by the tests as a program of its own.

    torchrun plain_server.py EXPORT PARQUET OUT

loads an export into a plain DLRM, sharded by TorchRec's own sharders on however many ranks there are, and saves the
logits of all rows of a Parquet file.
"""

import json
import os
import sys
from pathlib import Path

sys.modules["mlet_dist"] = None  # type: ignore[assignment]  # importing it now raises ModuleNotFoundError

import pyarrow.parquet as pq
import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.models.dlrm import DLRM


def main(export: Path, parquet: Path, out: Path) -> None:
    dist.init_process_group("gloo")
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
        embedding_bag_collection=EmbeddingBagCollection(tables, device=torch.device("meta")),
        dense_in_features=len(manifest["model"]["dense"]),
        dense_arch_layer_sizes=[*layers["bottom_mlp"], layers["embedding_dim"]],
        over_arch_layer_sizes=[*layers["top_mlp"], 1],
    )
    served = DistributedModelParallel(model, device=torch.device("cpu"))
    state = served.state_dict()
    dcp.load(state, checkpoint_id=export / manifest["state"])
    served.load_state_dict(state)

    rows = pq.read_table(parquet)
    names = [table.name for table in tables]
    dense = torch.stack([torch.tensor(rows[name].to_pylist()) for name in manifest["model"]["dense"]], dim=1)
    ids = torch.cat([torch.tensor(rows[name].to_pylist()) for name in names])
    sparse = KeyedJaggedTensor(names, ids, lengths=torch.ones(len(ids), dtype=torch.int64))
    with torch.no_grad():
        logits = served(dense, sparse)
    if dist.get_rank() == 0:
        torch.save(logits.squeeze(-1), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "mlet_dist" not in os.environ.get("PYTHONPATH", "")
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
