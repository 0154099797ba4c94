"""What ``model.tables`` and ``model.single_layer_up_to`` make of single tables."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.table_settings import TableModelConfig, TableSettings
from mlet_dist.errors import UserError

SIZES = {"C1": 64, "C2": 65, "C10": 4, "C11": 10**6}
ALL = ModelConfig().of_all_tables  # d 16, k 64


def config(directory: Path, *overrides: str) -> Config:
    path = directory / "run.yaml"
    path.write_text("data: {path: logs}\nrun: {dir: out}\nmodel: {name: dlrm_dcn}\n")
    return load_config(path, overrides)


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """Return the settings of all tables that overrides of a config give."""

    def found(*overrides: str) -> dict[str, TableSettings]:
        own = config(tmp_path, *overrides)
        own.check_tables(list(SIZES))
        return own.table_settings(SIZES)

    return found


def hidden_dims(found: dict[str, TableSettings]) -> dict[str, int | None]:
    return {name: each.hidden_dim for name, each in found.items()}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), (None, 64, None, 64)),
        (("model.single_layer_up_to=0",), (64, 64, 64, 64)),
        (("model.single_layer_up_to=65",), (None, None, None, 64)),
        (("model.single_layer_up_to=3",), (64, 64, 64, 64)),
        (("model.hidden_dim=128",), (None, None, None, 128)),
        (("model.hidden_dim=null",), (None, None, None, None)),
        (("model.hidden_dim=null", "model.tables.C2.hidden_dim=32"), (None, 32, None, None)),
        (("model.tables.C10.hidden_dim=32",), (None, 64, 32, 64)),
        (("model.tables.C11.hidden_dim=null",), (None, 64, None, None)),
        (("model.tables.C1*.hidden_dim=32",), (32, 64, 32, 32)),
        (("model.tables.C1?.hidden_dim=32", "model.tables.C1*.hidden_dim=null"), (None, 64, 32, 32)),
        (("model.tables.C1*.hidden_dim=null", "model.tables.C1?.hidden_dim=32"), (None, 64, None, None)),
        (("model.tables.C*.hidden_dim=null", "model.tables.C11.hidden_dim=32"), (None, None, None, 32)),
        (("model.tables.*.hidden_dim=32", "model.tables.C11.hidden_dim=default"), (32, 32, 32, 32)),
        (("compression.policy=static",), (64, 64, 64, 64)),
        (("model.projection_init_std=0.25",), (64, 64, 64, 64)),  # σ√k = 2: two layers learn at another rate
        (("model.projection_init_std=0.125",), (None, 64, None, 64)),
        (("optimizer.name=adagrad",), (64, 64, 64, 64)),  # the rate depends on k
        (("optimizer.name=adagrad", "model.single_layer_up_to=64"), (None, 64, None, 64)),
        (("model.projection_init_std=0.25", "model.single_layer_up_to=64"), (None, 64, None, 64)),
        (("compression.policy=static", "model.single_layer_up_to=64"), (None, 64, None, 64)),
    ],
)
def test_k_of_each_table(settings: Any, overrides: tuple[str, ...], expected: tuple[int | None, ...]) -> None:
    """Rules for all tables give way to patterns, in order, and these to the entry with the table's name."""
    assert tuple(hidden_dims(settings(*overrides)).values()) == expected


def test_each_setting_is_that_of_the_first_entry_that_has_it(settings: Any) -> None:
    found = settings(
        'model.tables={"C1*": {embedding_dim: 8, pooling: mean, rows_init_gain: 3}, '
        "C11: {embedding_dim: 32, hidden_dim: 128, rows_init: normal, rows_init_std: 0.5, "
        "projection_init: orthogonal, projection_init_std: 0.125}}"
    )
    assert found == {
        "C1": dataclasses.replace(ALL, embedding_dim=8, hidden_dim=None, pooling="mean", rows_init_gain=3.0),
        "C2": ALL,
        "C10": dataclasses.replace(ALL, embedding_dim=8, hidden_dim=None, pooling="mean", rows_init_gain=3.0),
        "C11": TableSettings(32, 128, "mean", "normal", 0.5, 3.0, 0.125, "orthogonal"),
    }


def test_a_name_with_wildcards_is_a_name_first() -> None:
    model = ModelConfig(tables={"C[1]": TableModelConfig(embedding_dim=8), "D?": TableModelConfig(embedding_dim=4)})
    assert [model.of_table(name, 9).embedding_dim for name in ("C[1]", "C1", "D1", "D?", "D")] == [8, 8, 4, 4, 16]


def test_single_layers_keep_all_but_k() -> None:
    own = {"C1*": TableModelConfig(embedding_dim=8, hidden_dim=32), "C2": TableModelConfig(pooling="mean")}
    single = ModelConfig(single_layer_up_to=9, tables=own).single_layer()
    for name, rows in SIZES.items():
        expected = dataclasses.replace(ModelConfig(tables=own).of_table(name, rows), hidden_dim=None)
        assert single.of_table(name, rows) == expected


def message(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.tables.C12.hidden_dim=8", "model.tables: the model has no table 'C12' (did you mean 'C2'?)"),
        ("model.tables.X*.hidden_dim=8", "model.tables: no table matches 'X*'; it has C1, C2, C10, C11"),
        ("model.tables.C1.hidden_dim=6", "model.tables.C1.hidden_dim is 6, it must be a multiple of 4; use 4 or 8"),
        ("model.tables.C1.hidden_dim=none", "expected a whole number or default or null, found none"),
        ("model.tables.C1.k=8", "model.tables.C1.k: unknown key"),
        ("model.single_layer_up_to=-1", "model.single_layer_up_to is -1, it must be at least 0"),
        ("model.single_layer_up_to=null", "expected a whole number or auto, found null"),
    ],
)
def test_errors_are_one_line(settings: Any, override: str, expected: str) -> None:
    assert expected in message(settings, override)


@pytest.mark.parametrize("name", ["dlrm", "deepfm"])
def test_dot_products_need_one_d(settings: Any, name: str) -> None:
    found = message(settings, f"model.name={name}", "model.tables.C1?.embedding_dim=8")
    assert found.startswith(
        f"model.tables gives table 'C10' embedding_dim 8, and model.name {name} takes dot products of vectors, all of "
        "model.embedding_dim 16 columns; use dlrm_dcn or two_tower"
    )
    assert settings(f"model.name={name}", "model.tables.C1.embedding_dim=16")["C1"].embedding_dim == 16
    assert settings(f"model.name={name}", "model.builder=own:build", "model.tables.*.embedding_dim=8")


ADAPTIVE = ("compression.policy=adaptive",)
CHUNKS = (*ADAPTIVE, "compression.nested=false")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((*ADAPTIVE, "model.tables.C1.embedding_dim=8"), "model.tables.C1.embedding_dim is 8, which does not go with"),
        ((*CHUNKS, "model.tables.C*.hidden_dim=null"), "model.tables.C*.hidden_dim is null, which does not go with"),
        ((*CHUNKS, "model.single_layer_up_to=9"), "model.single_layer_up_to is 9, which does not go with compression"),
        (
            ("compression.policy=static", "model.tables.C1.hidden_dim=8"),
            "model.tables.C1.hidden_dim is 8, which does not go with compression.policy static; use 16 or more",
        ),
        (
            ("compression.policy=static", "model.tables.C1.hidden_dim=96", "compression.widths=[128]"),
            "compression.widths is [128], which does not go with compression.policy static; use widths up to 96, "
            "which is model.tables.C1.hidden_dim",
        ),
    ],
)
def test_what_compression_cannot_mean_is_refused(settings: Any, overrides: tuple[str, ...], expected: str) -> None:
    assert f"command line: {expected}" in message(settings, *overrides)


def test_cuda_kernels_limit_every_table(tmp_path: Path) -> None:
    wide = config(tmp_path, "model.tables.C1*.hidden_dim=4096")
    assert "model.tables.C1*.hidden_dim makes rows of 4096 columns" in message(wide.check_device, "cuda")
    wide.check_device("cpu")


def test_warnings_name_the_table(tmp_path: Path) -> None:
    found = config(tmp_path, "model.tables.C2.embedding_dim=128").warnings()
    assert [each.partition(": ")[0] for each in found] == [
        "model.tables.C2.hidden_dim 64 is below model.tables.C2.embedding_dim 128"
    ]


def test_the_other_sections_take_patterns_too(tmp_path: Path) -> None:
    found = config(
        tmp_path,
        'sharding.tables={"C1*": {exchange: after, rows_dtype: fp16}, C10: {exchange: reduce_scatter}}',
        'compression.tables={"C1?": {max_width: 16}, "C*": {min_width: 8}, C2: {min_width: 4}}',
    )
    found.check_tables(list(SIZES))
    own = {name: found.sharding.of_table(name) for name in SIZES}
    assert {name: (each.exchange, each.rows_dtype) for name, each in own.items()} == {
        "C1": ("after", "fp16"),
        "C2": ("auto", "fp32"),
        "C10": ("reduce_scatter", "fp16"),
        "C11": ("after", "fp16"),
    }
    limits = {name: found.compression.limits(name) for name in SIZES}
    assert {name: (each.min_width, each.max_width) for name, each in limits.items()} == {
        "C1": (8, None),
        "C2": (4, None),
        "C10": (0, 16),
        "C11": (0, 16),
    }
    for section in ("sharding", "compression"):
        wrong = config(tmp_path, f"{section}.tables={{'X?': {{}}}}")
        assert message(wrong.check_tables, list(SIZES)).startswith(
            f"{section}.tables: no table matches 'X?'; it has C1"
        )
