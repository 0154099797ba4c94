"""The tables of other programs are found, named, and read in ranges of rows."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlet_dist.errors import UserError
from mlet_dist.export.factorize.existing_tables import open_existing
from mlet_dist.export.source import Tables
from mlet_dist.models.spec import TABLES_PREFIX
from tests.conftest import TrainedRun
from tests.helpers import sharded_tables
from tests.helpers.train_in_ranks import Ranks

TABLES = {
    "a": torch.arange(40.0).reshape(10, 4),
    "b": torch.arange(21.0).reshape(7, 3).half(),
    "c": torch.arange(8.0).reshape(4, 2).bfloat16(),
    "d": torch.arange(6.0).reshape(2, 3).double(),
}
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def _all(existing: Tables) -> dict[str, torch.Tensor]:
    """Read every table in two ranges."""
    found = {}
    for name, table in existing.tables.items():
        middle = table.num_embeddings // 2
        parts = [table.read_stored(0, middle), table.read_stored(middle, table.num_embeddings)]
        found[name] = torch.cat(parts)
        assert found[name].shape == (table.num_embeddings, table.embedding_dim)
    return found


def _check(path: Path, pattern: str | None = None) -> None:
    with open_existing(path, pattern) as existing:
        found = _all(existing)
    assert list(found) == list(TABLES)
    assert all(found[name].dtype == TABLES[name].dtype for name in TABLES)
    assert all(torch.equal(found[name], TABLES[name]) for name in TABLES)


def _save_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], offsets: dict[str, list[int]] | None = None
) -> None:
    header: dict[str, Any] = {} if offsets is None else {
        "__metadata__": {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": at} for name, at in offsets.items()})}
    }  # fmt: skip
    values = b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        ends = [len(values), len(values) + len(data)]
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends}
        values += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


@pytest.mark.parametrize(
    "named", [lambda table: table, lambda table: f"{table}.weight", lambda table: f"x.embedding_bags.{table}.weight"]
)
def test_a_state_dict_of_torch_save_is_read(tmp_path: Path, named: Callable[[str], str]) -> None:
    state = {named(name): table for name, table in TABLES.items()}
    torch.save(state, tmp_path / "flat.pt")
    _check(tmp_path / "flat.pt")
    if "." in named("a"):
        nested = {"epoch": 3, "model": {**state, "over.weight": torch.ones(2, 2)}, "optimizer": {"lr": 0.1}}
        torch.save(nested, tmp_path / "nested.pt")
        if "embedding_bags" in named("a"):
            _check(tmp_path / "nested.pt")
        else:  # the names do not tell which of them are tables
            message = r"nested\.pt: cannot tell which of its tensors are tables; .* 'model\.a\.weight'"
            with pytest.raises(UserError, match=message):
                open_existing(tmp_path / "nested.pt")
            _check(tmp_path / "nested.pt", r"model\.(?P<table>.)\.weight")


def test_a_file_in_the_format_before_zip_is_named(tmp_path: Path) -> None:
    torch.save(TABLES, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    message = r"old\.pt: is in the format of torch\.save before 1\.6; load it with torch\.load and save it again"
    with pytest.raises(UserError, match=message):
        open_existing(tmp_path / "old.pt")


def test_the_rows_of_a_view_are_read(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    views = {"columns": base[:, 3:7], "rows": base[2:5], "expanded": base[:1].expand(5, 10)}
    torch.save(views, tmp_path / "views.pt")
    with open_existing(tmp_path / "views.pt") as existing:
        found = _all(existing)
    assert all(torch.equal(found[name], view) for name, view in views.items())
    torch.save({"transposed": base.T}, tmp_path / "transposed.pt")
    with (
        open_existing(tmp_path / "transposed.pt") as existing,
        pytest.raises(UserError, match="'transposed' is not stored row by row"),
    ):
        _all(existing)


def test_safetensors_in_one_file_in_several_and_sharded_are_read(tmp_path: Path) -> None:
    _save_safetensors(tmp_path / "one.safetensors", TABLES)
    _check(tmp_path / "one.safetensors")

    many = tmp_path / "many"
    many.mkdir()
    for index, (name, table) in enumerate(TABLES.items()):
        _save_safetensors(many / f"model-{index}.safetensors", {name: table})
    _check(many)
    names = {name: f"model-{index}.safetensors" for index, name in enumerate(TABLES)}
    (many / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    _check(many / "model.safetensors.index.json")

    parts = tmp_path / "parts"  # as by torch's HuggingFaceStorageWriter: "a" sharded by rows, "b" by columns
    parts.mkdir()
    unsharded = {"c": TABLES["c"], "d": TABLES["d"]}
    zero_offsets = {name: [0, 0] for name in unsharded}
    _save_safetensors(
        parts / "shard-1.safetensors",
        {"a": TABLES["a"][6:], "b": TABLES["b"][:, :2]},
        {"a": [6, 0], "b": [0, 0]},
    )
    _save_safetensors(
        parts / "shard-2.safetensors",
        {"a": TABLES["a"][:6], "b": TABLES["b"][:, 2:], **unsharded},
        {"a": [0, 0], "b": [0, 2], **zero_offsets},
    )
    _check(parts)
    (parts / "shard-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"parts: holds 3 of 9 values of rows of 'b'"):
        _check(parts)
    (many / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"many/model-2\.safetensors is missing"):
        open_existing(many)


@pytest.mark.multirank
def test_tables_that_torchrec_sharded_are_read(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(sharded_tables.save, str(tmp_path / "dcp"))
    with open_existing(tmp_path / "dcp") as existing:
        found = _all(existing)
        assert existing.spec is None
    assert sorted(found) == ["by_columns", "by_rows", "on_one_rank"]
    assert all(torch.equal(tensor, sharded_tables.table(name)) for name, tensor in found.items())


def test_dense_layers_are_kept_if_the_names_are_those_of_a_dlrm(tmp_path: Path) -> None:
    dense = {"dense_arch.model.weight": torch.ones(2, 3), "over_arch.model.bias": torch.ones(2)}
    tables = {f"{TABLES_PREFIX}embedding_bags.{name}.weight": table for name, table in TABLES.items()}
    for prefix in ("", "module.model."):
        state = {f"{prefix}{name}": tensor for name, tensor in (dense | tables).items()} | {
            "optimizer.x": torch.ones(1)
        }
        torch.save(state, tmp_path / "dlrm.pt")
        with open_existing(tmp_path / "dlrm.pt") as existing:
            assert existing.dense == {name: f"{prefix}{name}" for name in dense}
            assert torch.equal(existing.files.load(existing.dense["over_arch.model.bias"]), torch.ones(2))


def test_an_export_is_opened_with_its_model(exported: Path, trained: TrainedRun) -> None:
    with open_existing(exported) as existing:
        assert len(existing.tables) == 26
        assert existing.spec is not None
        assert existing.spec.model.hidden_dim is None
        assert all(name.startswith(("dense_arch.", "over_arch.")) for name in existing.dense)
        assert len(existing.dense) == 8
    with pytest.raises(UserError, match="its tables have two layers already; export the run first"):
        open_existing(trained.path)


def _write(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "pattern", "message"),
    [
        ("x.pt", {"a": torch.ones(3)}, None, r"'a' is \(3,\) of torch.float32; a table must have two dimensions"),
        ("x.pt", {"a": torch.ones(3, 3, dtype=torch.int64)}, None, "'a' is .* of torch.int64"),
        ("x.pt", {"a": torch.ones(0, 3), "b": torch.ones(2, 3)}, None, "'a' is .0, 3."),
        ("x.pt", {}, None, "It holds no tensors"),
        ("x.pt", {"a.b.c": torch.ones(2, 2)}, None, "cannot tell which of its tensors are tables.* It holds 'a.b.c'"),
        ("x.pt", {"a": torch.ones(2, 2)}, "b(?P<table>.)", "cannot tell which of its tensors are tables"),
        ("x.pt", {"a": torch.ones(2, 2)}, "(a", r"--table-pattern '\(a': not a regular expression"),
        ("x.pt", {"a": torch.ones(2, 2)}, "(a)", r"--table-pattern '\(a\)': has no group \(\?P<table>"),
        ("x.pt", {"a": torch.ones(2, 2), "a.weight": torch.ones(2, 2)}, None, "'a' and 'a.weight' would both be table"),
        ("x.pt", {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, "(?P<table>)[ab]", "matches nothing in 'a'"),
        (
            "x.pt",
            {"a": torch.ones(2, 2)},
            "(?P<table>b)?a",
            "its group 'table' matches nothing in 'a'; it must match a name",
        ),
        ("x.pt", [1, 2], None, "holds a list; save a state dict"),
        ("x.pt", {"a": Path("x")}, None, "not a state dict that torch.save wrote"),
        ("x.pt", b"abc", None, "not a state dict that torch.save wrote"),
        ("x.safetensors", b"abc", None, r"x.safetensors ends at byte 3"),
        ("x.safetensors", struct.pack("<Q", 2**62), None, "not a safetensors file"),
        ("x.safetensors", struct.pack("<Q", 2) + b"[]", None, "not a safetensors file"),
        (
            "x.safetensors",
            struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'.ljust(64),
            None,
            r"'a' is \(2, 2\) of torch.float32, but has 16 bytes",
        ),
        ("x.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', None, "gone.safetensors is missing"),
        ("x.index.json", b"{}", None, "not an index of safetensors files"),
    ],
)
def test_files_without_tables_are_named(
    tmp_path: Path, name: str, content: object, pattern: str | None, message: str
) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        open_existing(path, pattern)


def test_a_directory_without_tables_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tables; expected an export"):
        open_existing(tmp_path)
    with pytest.raises(UserError, match=r"gone\.pt is missing"):
        open_existing(tmp_path / "gone.pt")
    for index in (1, 2):
        _save_safetensors(tmp_path / f"{index}.safetensors", {"a": TABLES["a"]})
    with pytest.raises(UserError, match=r"2\.safetensors: holds 'a', which another file of .* holds, too"):
        open_existing(tmp_path)
