"""Quantised outputs are served by TorchRec's modules, unsharded and sharded, in a process without mlet_dist."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torchrec.inference.modules import quantize_inference_model
from torchrec.quant.embedding_modules import (
    EmbeddingBagCollection,
    quant_prep_enable_quant_state_dict_split_scale_bias_for_types,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.tensor_types import UInt4Tensor

from mlet_dist.checkpoint.load import load_model
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.serving.package import check_fits
from mlet_dist.export.serving.quantised import Serving, build_served, dense_tensors, load_dense, plan_serving
from mlet_dist.export.serving.served_model import layout_of
from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from tests.conftest import TrainedRun
from tests.helpers.mlet_command import ROOT

_DTYPES = {"fp16": torch.float16, "int8": torch.int8, "int4": torch.quint4x2}


def _quantised(exported: Path, name: str) -> torch.nn.Module:
    """Quantise the float32 output with TorchRec alone."""
    model = build_serving_model(ExportDirectory(exported).load()[0])
    load_model(model, exported / "model", key=None)
    kind = type(model.sparse_arch.embedding_bag_collection)
    quant_prep_enable_quant_state_dict_split_scale_bias_for_types(model, [kind])
    quantised = quantize_inference_model(model, quantization_dtype=_DTYPES[name])
    assert isinstance(quantised.sparse_arch.embedding_bag_collection, EmbeddingBagCollection)
    return quantised.eval()


def test_layers_that_are_not_trained_and_buffers_are_filled() -> None:
    own = ModelConfig(builder="tests.helpers.own_networks:frozen", embedding_dim=4, hidden_dim=8)
    model = build_served(ModelSpec(own, ("I1",), (SparseFeature("C1", 10),), seed=0), ENCODINGS["int8"])
    wanted = {name: torch.ones_like(tensor) for name, tensor in dense_tensors(model).items()}
    assert {"deep.0.weight", "fixed.weight", "scale", "mask"} < set(wanted)
    load_dense(model, wanted)
    assert bool(model.mask.all())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(KeyError, match="scale"):
        load_dense(model, {name: tensor for name, tensor in wanted.items() if name != "scale"})


@pytest.mark.parametrize("name", list(_DTYPES))
def test_stored_bytes_equal_torchrecs_quantisation_of_the_full_tables(exported: Path, name: str) -> None:
    expected = {
        key: tensor.view(torch.uint8) if isinstance(tensor, UInt4Tensor) else tensor
        for key, tensor in _quantised(exported, name).state_dict().items()
        if ".tbes." not in key
    }
    found = dcp.FileSystemReader(exported / name).read_metadata().state_dict_metadata
    assert set(found) == set(expected)
    state = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in found.items()}
    dcp.load(state, checkpoint_id=exported / name, no_dist=True)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    described = json.loads((exported / "manifest.json").read_text())["outputs"][name]
    tables = [tensor for key, tensor in state.items() if key.startswith(TABLES_PREFIX)]
    assert described["table_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tables)


def test_sizes_are_those_of_the_encodings(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    rows = sum(table["num_embeddings"] for table in manifest["tables"])
    sizes = {name: output["table_bytes"] / rows for name, output in manifest["outputs"].items()}
    # d = 4: a row has 4 bytes in int8 and 2 in int4, plus a scale and a bias of 2 bytes each
    assert sizes == {"dcp": 16, "safetensors": 16, "fp16": 8, "int8": 8, "int4": 6, "package": 8}


@pytest.mark.e2e
def test_plain_torchrec_serves_quantised_tables_unsharded_and_sharded(
    trained: TrainedRun, exported: Path, tmp_path: Path
) -> None:
    part, out = trained.data / "test" / "part-00000.parquet", tmp_path / "logits.pt"
    program = [sys.executable, str(ROOT / "tests/helpers/quantised_server.py"), str(exported), str(part), str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(program, cwd=tmp_path, check=True, timeout=300, env=environment, capture_output=True)
    logits = torch.load(out)
    rows = pq.read_table(part)
    spec = ExportDirectory(exported).load()[0]
    dense = torch.stack([torch.tensor(rows[name].to_pylist()) for name in spec.dense], dim=1)
    ids = torch.cat([torch.tensor(rows[feature.name].to_pylist()) for feature in spec.sparse])
    sparse = KeyedJaggedTensor([feature.name for feature in spec.sparse], ids, lengths=torch.ones_like(ids))
    assert set(logits) == set(_DTYPES)
    for name, found in logits.items():
        assert len(found["unsharded"]) == 601
        assert found["unsharded"].std() > 0.05
        assert torch.equal(found["unsharded"], found["sharded"])
        with torch.no_grad():
            assert torch.equal(found["unsharded"], _quantised(exported, name)(dense, sparse))


def test_the_plan_spreads_the_tables_over_the_ranks(exported: Path) -> None:
    outputs = json.loads((exported / "manifest.json").read_text())["outputs"]
    assert [name for name, output in outputs.items() if "plan" in output] == ["fp16", "int8", "int4"]
    plan = outputs["int8"]["plan"]
    assert (plan["ranks"], plan["device"], len(plan["tables"])) == (2, "cpu", 26)
    assert {rank for table in plan["tables"].values() for rank in table["ranks"]} == {0, 1}
    assert all(table["sharding_type"] == "table_wise" for table in plan["tables"].values())


def _large(rows: int) -> ModelSpec:
    model = ModelConfig(embedding_dim=16, hidden_dim=None, bottom_mlp=(8,), top_mlp=(8,))
    return ModelSpec(model, ("I1",), (SparseFeature("C1", rows), SparseFeature("C2", rows)), seed=0)


def test_planning_for_gpus_needs_no_gpu_and_rejects_tables_that_do_not_fit() -> None:
    plan = plan_serving(_large(1_000_000_000), ENCODINGS["int4"], Serving(2, "cuda"))
    assert {table["shards"][0]["placement"] for table in plan["tables"].values()} == {"rank:0/cuda:0", "rank:1/cuda:1"}
    with pytest.raises(UserError, match=r"--serving-ranks 2: TorchRec finds no plan for int8: .*insufficient storage"):
        plan_serving(_large(2_000_000_000), ENCODINGS["int8"], Serving(2, "cuda"))


def test_a_package_larger_than_the_memory_is_rejected() -> None:
    with pytest.raises(UserError, match=r"in fp32 they take 256,000,000,000,000 bytes, and this machine has"):
        check_fits(layout_of(_large(2_000_000_000_000)), ENCODINGS["fp32"])
    check_fits(layout_of(_large(1000)), ENCODINGS["fp32"])
