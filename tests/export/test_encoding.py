"""Rows are encoded independently to the same bytes as by TorchRec's quantisation of the full table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.inference.modules import quantize_embeddings, quantize_inference_model
from torchrec.modules.embedding_configs import DataType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantisedEmbeddingBagCollection
from torchrec.quant.embedding_modules import quant_prep_enable_quant_state_dict_split_scale_bias_for_types
from torchrec.tensor_types import UInt4Tensor

from mlet_dist.errors import UserError
from mlet_dist.export.encoding import ENCODINGS, RowOverflow

_TORCH = {"fp16": torch.float16, "int8": torch.int8, "int4": torch.quint4x2}


def _table(rows: int, columns: int) -> torch.Tensor:
    """Return rows of very different magnitudes: one is zero, one constant, one below the resolution of float16."""
    table = torch.randn(rows, columns) * torch.logspace(-6, 3, rows).unsqueeze(1)
    table[0], table[1], table[2] = 0, 0.3, 1e-9
    return table


def _by_torchrec(table: torch.Tensor, name: str, inference: bool, split: bool = True) -> dict[str, torch.Tensor]:
    config = EmbeddingBagConfig(name="t", num_embeddings=len(table), embedding_dim=table.shape[1], feature_names=["f"])
    model = torch.nn.Sequential(EmbeddingBagCollection([config]))
    model.load_state_dict({"0.embedding_bags.t.weight": table})
    if split:
        quant_prep_enable_quant_state_dict_split_scale_bias_for_types(model, [EmbeddingBagCollection])
    if inference:
        model = quantize_inference_model(model, quantization_dtype=_TORCH[name])
    else:
        model = quantize_embeddings(model, dtype=_TORCH[name], inplace=True)
    prefix = "0.embedding_bags.t.weight"
    return {
        key.removeprefix(prefix): tensor.view(torch.uint8) if isinstance(tensor, UInt4Tensor) else tensor
        for key, tensor in model.state_dict().items()
        if key.startswith(prefix)
    }


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("columns", [4, 8, 12, 16, 20, 64, 100])
def test_encoded_bytes_equal_torchrecs(name: str, columns: int, inference: bool) -> None:
    table, encoding = _table(50, columns), ENCODINGS[name]
    expected = _by_torchrec(table, name, inference)
    found = encoding.encode(table)
    assert set(found) == set(expected) == set(encoding.parts(columns))
    for suffix, part in encoding.parts(columns).items():
        assert torch.equal(found[suffix], expected[suffix]), suffix
        assert found[suffix].is_contiguous()
        assert (found[suffix].shape, found[suffix].dtype) == ((50, part.columns), part.dtype)


@pytest.mark.parametrize(("name", "columns"), [("fp16", 3), ("fp16", 20), ("int8", 2), ("int8", 20), ("int4", 20)])
def test_torchrecs_unsplit_rows_are_the_same_bytes_padded(name: str, columns: int) -> None:
    """Unless scale and bias are split off, a row of TorchRec is ``scale, bias, values, zeros up to 16 bytes``."""
    table, encoding = _table(50, columns), ENCODINGS[name]
    parts = encoding.encode(table)
    row = torch.cat([parts[each].view(torch.uint8) for each in ("_qscale", "_qbias", "") if each in parts], dim=1)
    padded = torch.nn.functional.pad(row, (0, -row.shape[1] % 16))
    assert encoding.row_bytes(columns) == row.shape[1]
    assert torch.equal(padded, _by_torchrec(table, name, inference=True, split=False)[""])


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(sorted(ENCODINGS)), columns=st.sampled_from([4, 16, 36]), cut=st.integers(0, 40))
def test_rows_are_encoded_independently(name: str, columns: int, cut: int) -> None:
    table, encoding = _table(40, columns), ENCODINGS[name]
    full, parts = encoding.encode(table), [encoding.encode(table[:cut]), encoding.encode(table[cut:])]
    for suffix, tensor in full.items():
        assert torch.equal(tensor, torch.cat([each[suffix] for each in parts])), suffix


def test_float32_is_not_changed() -> None:
    table = _table(5, 3)
    assert torch.equal(ENCODINGS["fp32"].encode(table)[""], table)
    assert ENCODINGS["fp32"].row_bytes(3) == 12
    ENCODINGS["fp32"].check(3)
    ENCODINGS["fp16"].check(3)


@pytest.mark.parametrize(("name", "columns", "multiple"), [("int8", 7, 2), ("int4", 6, 4)])
def test_widths_that_torchrec_cannot_pack_are_rejected(name: str, columns: int, multiple: int) -> None:
    with pytest.raises(UserError, match=f"{name} .* multiple of {multiple}, and it is {columns}"):
        ENCODINGS[name].check(columns)
    with pytest.raises(RuntimeError, match="multiple of 2 Bytes"):
        _by_torchrec(_table(5, columns), name, inference=True)
    ENCODINGS[name].check(8)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fp16", [0.0, 0.0, 7e4, 0.0]),
        ("int8", [0.0, -7e4, 0.0, 0.0]),  # the minimum overflows
        ("int8", [-3e4, 3e7, 0.0, 0.0]),  # the quantisation step overflows
        ("int4", [0.0, 2e6, 0.0, 0.0]),
    ],
)
def test_a_value_that_is_too_large_is_named(name: str, values: list[float]) -> None:
    table = torch.zeros(5, 4)
    table[3] = torch.tensor(values)
    with pytest.raises(RowOverflow, match=rf"row 3: the value .* is too large for {name}") as raised:
        ENCODINGS[name].encode(table)
    assert raised.value.row == 3


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_decoded_rows_equal_those_that_torchrec_looks_up(name: str) -> None:
    encoding, rows = ENCODINGS[name], torch.randn(30, 12) * torch.logspace(-3, 2, 30).unsqueeze(1)
    parts = encoding.encode(rows)
    config = EmbeddingBagConfig(
        name="t", num_embeddings=30, embedding_dim=12, feature_names=["f"], data_type=DataType(name.upper())
    )
    model = QuantisedEmbeddingBagCollection(
        [config], False, torch.device("cpu"), quant_state_dict_split_scale_bias=True
    )
    for key, tensor in model.state_dict().items():
        raw = tensor.view(torch.uint8) if isinstance(tensor, UInt4Tensor) else tensor
        raw.copy_(parts[key.removeprefix("embedding_bags.t.weight")])
    bags = KeyedJaggedTensor(["f"], torch.arange(30), lengths=torch.ones(30, dtype=torch.int64))
    torch.testing.assert_close(encoding.decode(parts), model(bags).values(), rtol=1e-6, atol=1e-6)
