"""A server of kept rows and of mixed widths that cannot import mlet_dist, run by the tests as a program of its own.

    python forms_server.py EXPORT PARQUET OUT

loads each output with a layout into TorchRec's EmbeddingBagCollection, float or quantised, and saves the logits of all
rows of a Parquet file by output. It needs only what the manifest says of the output's tables (`layout`).
"""

import json
import sys
from pathlib import Path

sys.modules["mlet_dist"] = None  # type: ignore[assignment]  # importing it now raises ModuleNotFoundError

import pyarrow.parquet as pq
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.inference.modules import quantize_inference_model
from torchrec.models.dlrm import DLRM
from torchrec.quant.embedding_modules import quant_prep_enable_quant_state_dict_split_scale_bias_for_types
from torchrec.tensor_types import UInt4Tensor

DTYPES = {"fp16": torch.float16, "int8": torch.int8, "int4": torch.quint4x2}
PREFIX = "sparse_arch.embedding_bag_collection."


class Tables(torch.nn.Module):
    """The tables of an output, which take the ids of the data set and return d columns for each feature.

    Tables have sum pooling here: for mean pooling, divide the sum of the parts by the size of the bag.
    """

    def __init__(self, layout: dict) -> None:
        super().__init__()
        self.layout = layout["tables"]
        self.d = layout["embedding_dim"]
        self.configs = [
            EmbeddingBagConfig(name=name, num_embeddings=1, embedding_dim=self.d, feature_names=[name])
            for name in self.layout
        ]
        self.embedding_bags = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name=part["name"],
                    num_embeddings=part["num_embeddings"],
                    embedding_dim=part["embedding_dim"],
                    feature_names=[part["name"]],
                )
                for table in self.layout.values()
                for part in table["parts"]
            ]
        )
        self.extra: dict[str, torch.Tensor] = {}

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self.configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        names, values, lengths = [], [], []
        for name, table in self.layout.items():
            ids, bags = features[name].values(), features[name].lengths()
            if table["kept_ids"] is None:
                rows = ids.clamp(max=table["kept"])
            else:
                kept = self.extra[table["kept_ids"]]
                place = torch.searchsorted(kept, ids.to(kept.dtype))
                rows = torch.where(kept[place.clamp(max=len(kept) - 1)] == ids, place, table["kept"])
            bag = torch.repeat_interleave(torch.arange(len(bags)), bags)
            for part in table["parts"]:
                of_part = rows - part["first_row"]
                inside = (of_part >= 0) & (of_part < part["num_embeddings"])
                names.append(part["name"])
                values.append(of_part[inside])
                lengths.append(torch.bincount(bag[inside], minlength=len(bags)))
        found = self.embedding_bags(KeyedJaggedTensor(names, torch.cat(values), lengths=torch.cat(lengths))).to_dict()
        vectors = []
        for table in self.layout.values():
            vectors.append(torch.zeros(features.stride(), self.d))
            for part in table["parts"]:
                piece = found[part["name"]]
                vectors[-1] += piece if part["projection"] is None else piece @ self.extra[part["projection"]]
        return KeyedTensor(list(self.layout), [self.d] * len(self.layout), torch.cat(vectors, dim=1))


def load(export: Path, manifest: dict, output: str) -> DLRM:
    described = manifest["outputs"][output]
    directory, layers = export / described["directory"], manifest["model"]["model"]
    model = DLRM(
        embedding_bag_collection=Tables(described["layout"]),
        dense_in_features=len(manifest["model"]["dense"]),
        dense_arch_layer_sizes=[*layers["bottom_mlp"], layers["embedding_dim"]],
        over_arch_layer_sizes=[*layers["top_mlp"], 1],
    )
    if described["encoding"] != "fp32":
        quant_prep_enable_quant_state_dict_split_scale_bias_for_types(model, [EmbeddingBagCollection])
        model = quantize_inference_model(model, quantization_dtype=DTYPES[described["encoding"]])
    tables = model.sparse_arch.embedding_bag_collection
    state = {
        name.replace(f"{PREFIX}embedding_bags.", PREFIX): tensor.view(torch.uint8)
        if isinstance(tensor, UInt4Tensor)
        else tensor
        for name, tensor in model.state_dict().items()
        if ".tbes." not in name
    }
    is_dcp = described["format"] == "distcp"
    reader = dcp.FileSystemReader(directory) if is_dcp else HuggingFaceStorageReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
    for table in tables.layout.values():
        for name in [table["kept_ids"], *(part["projection"] for part in table["parts"])]:
            if name is not None:
                tables.extra[name] = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
    dcp.load(state | tables.extra, storage_reader=reader, no_dist=True)  # in place
    return model


def main(export: Path, parquet: Path, out: Path) -> None:
    manifest = json.loads((export / "manifest.json").read_text())
    rows = pq.read_table(parquet)
    names = [feature["name"] for feature in manifest["model"]["sparse"]]
    dense = torch.stack([torch.tensor(rows[name].to_pylist()) for name in manifest["model"]["dense"]], dim=1)
    ids = torch.cat([torch.tensor(rows[name].to_pylist()) for name in names])
    sparse = KeyedJaggedTensor(names, ids, lengths=torch.ones(len(ids), dtype=torch.int64))
    logits = {}
    with torch.no_grad():
        for output, described in manifest["outputs"].items():
            if "layout" in described and output != "package":
                logits[output] = load(export, manifest, output)(dense, sparse).squeeze(1)
    torch.save(logits, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
