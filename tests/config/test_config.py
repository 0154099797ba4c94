import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mlet_dist.config.compression_section import CompressionConfig, TableCompressionConfig
from mlet_dist.config.config_file import Config, load_config, save_config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from mlet_dist.config.sharding_section import ShardingConfig, TableShardingConfig
from mlet_dist.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MINIMAL = "data: {path: logs}\nrun: {dir: out}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_being_saved(path: Path, tmp_path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    config = load_config(path)
    assert {"data", "run"} <= set(written)
    for section, settings in written.items():
        for key, value in settings.items():
            assert config.to_dict()[section][key] == value, f"{section}.{key}"
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


rates, scales = st.floats(1e-30, 1e30), st.floats(1e-15, 1e15)
text = st.text(min_size=1).filter(lambda text: text.strip() and not text.startswith("~") and "\0" not in text)
names = st.lists(text, min_size=1, unique=True).map(tuple)
types = st.lists(st.sampled_from(["row_wise", "table_wise"]), min_size=1, max_size=2).map(tuple)
shares = st.floats(0.01, 0.99)
configs = st.builds(
    Config,
    data=st.builds(DataConfig, path=text, sparse_features=st.none() | names),
    run=st.builds(RunConfig, dir=text, overwrite=st.booleans()),
    model=st.builds(
        ModelConfig,
        hidden_dim=st.none() | st.integers(1, 2**14).map(lambda quarter: 4 * quarter),
        top_mlp=st.lists(st.integers(1, 4096), min_size=1).map(tuple),
        rows_init=st.sampled_from(["uniform", "normal"]),
        projection_init=st.sampled_from(["normal", "orthogonal"]),
        projection_init_std=st.none() | scales,
    ),
    compression=st.builds(
        CompressionConfig,
        budget=shares | st.sampled_from(["12GB", "1.5 GiB"]),
        widths=st.none() | st.just((4,)),
        tables=st.dictionaries(text, st.builds(TableCompressionConfig, min_width=st.just(4)), max_size=3),
    ),
    optimizer=st.builds(
        OptimizerConfig,
        name=st.sampled_from(["sgd", "adagrad", "rowwise_adagrad", "adam"]),
        learning_rate=rates,
        rows_learning_rate=st.none() | rates,
        warmup_steps=st.integers(0, 100),
        decay=st.sampled_from(["linear", "cosine"]),
        decay_start=st.none() | st.integers(100, 10**15),
    ),
    sharding=st.builds(
        ShardingConfig,
        sharding_types=st.none() | types,
        cache_load_factor=shares,
        forward_comm=st.sampled_from(["fp32", "fp16", "bf16"]),
        rows_dtype=st.sampled_from(["fp32", "fp16"]),
        tables=st.dictionaries(
            text,
            st.builds(TableShardingConfig, sharding_types=st.none() | types, cache_load_factor=st.none() | shares),
            max_size=3,
        ),
    ),
    train=st.builds(TrainConfig, seed=st.integers(0, 2**63 - 1), max_steps=st.none() | st.integers(1, 10**15)),
)


@hypothesis_settings(deadline=None)  # it writes a file, which may take long on a busy machine
@given(config=configs)
def test_any_config_survives_being_saved(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    save_config(config, path)
    assert load_config(path) == config


# A wrong line of the file -> the message after the file's name.
ERRORS = {
    "modle: {hidden_dim: 8}": r"modle: unknown key \(did you mean 'model'\?\); known keys here are data, run, model,",
    "model: {hiden_dim: 8}": r"model\.hiden_dim: unknown key \(did you mean 'hidden_dim'\?\); known .*rows_init_gain",
    'model: {"a\\nb": 8}': r"model\.a b: unknown key",
    "model: {hidden_dim: wide}": r"model\.hidden_dim: expected a whole number or null, found wide$",
    "model: {hidden_dim: true}": r"model\.hidden_dim: expected a whole number or null, found true$",
    "model: {hidden_dim: 8.0}": r"model\.hidden_dim: expected a whole number or null, found 8\.0$",
    "model: {bottom_mlp: [64, x]}": r"model\.bottom_mlp: expected a list, each a whole number, found \[64, x\]$",
    "model: [1, 2]": r"model: expected a section of keys, found \[1, 2\]$",
    "model: {embedding_dim: 0}": r"model\.embedding_dim is 0, it must be at least 1$",
    "model: {hidden_dim: 9}": r"model\.hidden_dim is 9, it must be a multiple of 4; use 8 or 12$",
    "model: {embedding_dim: 3}": r"model\.embedding_dim is 3, it must be a multiple of 4; use 4$",
    "model: {hidden_dim: 0}": r"model\.hidden_dim is 0, it must be at least 1$",
    "model: {embedding_dim: 65540}": r"model\.embedding_dim is 65540, it must be at most 65536$",
    "model: {hidden_dim: 65537}": r"model\.hidden_dim is 65537, it must be at most 65536$",
    "model: {top_mlp: []}": r"model\.top_mlp is \[\], it must have at least 1 entry$",
    "optimizer: {learning_rate: fast}": r"optimizer\.learning_rate: expected a number, found fast$",
    "optimizer: {learning_rate: 1" + 400 * "0" + "}": r"optimizer\.learning_rate: expected a number, found 10{199}…$",
    "optimizer: {learning_rate: 0}": r"optimizer\.learning_rate is 0, it must be a finite number above 0$",
    "optimizer: {learning_rate: .nan}": r"optimizer\.learning_rate is \.nan, it must be a finite number above 0$",
    "optimizer: {learning_rate: .inf}": r"optimizer\.learning_rate is \.inf, it must be a finite number above 0$",
    "optimizer: {warmup_steps: -1}": r"optimizer\.warmup_steps is -1, it must be at least 0$",
    "optimizer: {decay: fast}": r"optimizer\.decay: expected one of constant, linear, cosine, found fast$",
    "optimizer: {decay_start: 9}": r"optimizer\.decay_start is 9, but optimizer\.decay is constant; use linear or",
    "optimizer: {decay: linear, warmup_steps: 9, decay_start: 8}": (
        r"optimizer\.decay_start is 8, it must be at least optimizer\.warmup_steps 9$"
    ),
    "train: {seed: -1}": r"train\.seed is -1, it must be at least 0$",
    f"train: {{seed: {2**63}}}": rf"train\.seed is {2**63}, it must be at most {2**63 - 1}$",
    "model: {bottom_mlp: [1000000001]}": r"model\.bottom_mlp is \[1000000001\], it must be at most 1000000000$",
    "optimizer: {learning_rate: 1e400}": r"optimizer\.learning_rate is '?1e400'?, it must be a finite number above 0$",
    "optimizer: {learning_rate: 1e39}": r"optimizer\.learning_rate is '?1e39'?, it must be at most 1e\+30$",
    "optimizer: {rows_learning_rate: 1e-60}": r"optimizer\.rows_learning_rate is .*, it must be at least 1e-30$",
    "model: {rows_init_gain: 1e300}": r"model\.rows_init_gain is .*, it must be at most 1000000000000000\.0$",
    "model: {rows_init_std: .nan}": r"model\.rows_init_std is \.nan, it must be a finite number above 0$",
    "train: {collective_timeout_s: 1e15}": r"train\.collective_timeout_s is .*, it must be at most 10000000\.0$",
    "train: {collective_timeout_s: 0.5}": r"train\.collective_timeout_s is 0\.5, it must be at least 1$",
    "train: {checkpoint_minutes: .inf}": r"train\.checkpoint_minutes is \.inf, it must be a finite number above 0$",
    "train: {max_steps: 1" + 400 * "0" + "}": r"train\.max_steps is 10{199}…, it must be at most 1000000000000000$",
    "train: {epochs: 0x" + 5000 * "f" + "}": r"train\.epochs is a number of more than 4,300 digits, it must be at most",
    "train: {epochs: " + 5000 * "9" + "}": r"not valid YAML: Exceeds the limit",
    "train: {device: tpu}": r"train\.device: expected one of auto, cpu, cuda, found tpu \(did you mean 'cpu'\?\)$",
    "optimizer:\n  name: |\n    a\n    b": r"optimizer\.name: expected one of sgd, .*, adam, found 'a b '$",
    "run: {dir: elsewhere}": r"not valid YAML in line 3: key 'run' is given twice$",
    "model: {": r"not valid YAML in line \d: ",
    "model:\n\thidden_dim: 8": r"not valid YAML in line 4: found character '\\t' that cannot start any token$",
    "model: {hidden_dim: 2024-13-45}": r"not valid YAML: month must be in 1\.\.12$",
    "model: " + 5000 * "[": r"not valid YAML: it is nested too deeply$",
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error[:40])
def test_an_error_in_the_file_is_reported_in_one_line(error: str, file: Path) -> None:
    file.write_text(f"{MINIMAL}{error}\n")
    assert re.match(re.escape(f"{file}: ") + ERRORS[error], error_of(file))


# A wrong override -> the message after "command line: ".
WRONG_OVERRIDES = {
    "model.hiden_dim=8": r"model\.hiden_dim: unknown key \(did you mean 'hidden_dim'\?\); known keys here are",
    "modle.hidden_dim=8": r"modle: unknown key \(did you mean 'model'\?\)",
    "model.hidden_dim=0": r"model\.hidden_dim is 0, it must be at least 1$",
    "optimizer.learning_rate=inf": r"optimizer\.learning_rate is inf, it must be a finite number above 0$",
    "optimizer.decay_start=3": r"optimizer\.decay_start is 3, but optimizer\.decay is constant; use linear or cosine$",
    "run.dir= ": r"run\.dir is empty; it must be a directory$",
    "data.sparse_features=[]": r"data\.sparse_features is \[\]; name at least one column, each once, or leave it null$",
    "data.dense_features=[a, a]": r"data\.dense_features is \[a, a\]; name at least one column, each once",
    "sharding.tables={a: 1, a: 2}": r"'sharding\.tables=\{a: 1, a: 2\}': the value is not valid YAML in line 1: key",
    "data.path": r"'data\.path': an override is written section\.key=value, for example data\.batch_size=256$",
    "model.hidden_dim=": r"model\.hidden_dim: expected a whole number or null, found ''$",
    "data.sparse_features= ": r"data\.sparse_features: expected a list, each text or null, found ''$",
    "data.batch_size=": r"data\.batch_size: expected a whole number, found ''$",
    "optimizer.learning_rate=": r"optimizer\.learning_rate: expected a number, found ''$",
    "optimizer.name=": r"optimizer\.name: expected one of sgd, adagrad, rowwise_adagrad, adam, found ''$",
    "run.dir=": r"run\.dir is empty; it must be a directory$",
    "model.hiden_dim=": r"model\.hiden_dim: unknown key",
    "path=x": r"'path=x': an override is written section\.key=value",
    "run.tag.team=ads": r"run\.tag\.team: unknown key \(did you mean 'tags'\?\); known keys here are dir, ",
    "data.a\nb=1": r"data\.a b: unknown key",
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_an_error_in_an_override_names_the_command_line(override: str, file: Path) -> None:
    assert re.match(f"command line: {WRONG_OVERRIDES[override]}", error_of(file, override))


# What a file adds, overrides, and the error, in which FILE is the file's name.
WRONG_COMPRESSION = {
    "a value within a table's settings": (
        "compression: {policy: static, tables: {C2: {max_width: 8}}}",
        ["compression.tables={C1: {min_width: 8, max_width: 4}}"],
        "command line: compression.tables.C1.min_width is 8, above max_width 4 of the same table; use the same value",
    ),
    "an unknown key within a table's settings": (
        "compression: {tables: {}}",
        ["compression.tables={C1: {widht: 8}}"],
        "command line: compression.tables.C1.widht: unknown key",
    ),
    "one table of several": (
        "compression: {policy: adaptive, tables: {C2: {max_width: 8}}}",
        ["compression.tables.C1.min_width=8"],
        "command line: compression.tables.C1.min_width is 8, which does not go with compression.policy adaptive "
        "(FILE); use max_width alone, or policy static",
    ),
    "tables of the file and one of the command line": (
        "sharding: {tables: {C2: {exchange: auto}}}",
        ["sharding.tables.C1.exchange=auto", "compression.policy=static"],
        "command line: sharding.tables is [C1, C2], which does not go with compression.policy static; leave it out",
    ),
    "the file against a policy of the command line": (
        "sharding: {exchange: after}",
        ["compression.policy=static"],
        "FILE: sharding.exchange is after, which does not go with compression.policy static (command line); use auto",
    ),
    "the file against a preset": (
        "sharding: {exchange: after}",
        ["compression.preset=recommended"],
        "FILE: sharding.exchange is after, which does not go with compression.policy static (command line: "
        "compression.preset recommended); use auto",
    ),
    "a default against a preset": (
        "model: {hidden_dim: 12, embedding_dim: 4}",
        ["compression.preset=fiited"],
        "command line: compression.preset fiited: compression.chunks is 8, which does not go with compression.policy "
        "adaptive; use a number of chunks that have 4, 8, 12, … of the 12 columns",
    ),
    "a preset of the file against the command line": (
        "compression: {preset: fiited}",
        ["compression.policy=static"],
        "FILE: compression.preset fiited: compression.nested is false, which does not go with compression.policy "
        "static (command line); use true",
    ),
}


@pytest.mark.parametrize("case", WRONG_COMPRESSION)
def test_an_error_names_what_gave_the_value(case: str, file: Path) -> None:
    added, overrides, message = WRONG_COMPRESSION[case]
    file.write_text(f"{MINIMAL}{added}\n")
    assert error_of(file, *overrides).startswith(message.replace("FILE", str(file)))


def test_an_error_in_the_file_beside_overrides_names_the_file(file: Path) -> None:
    file.write_text(f"{MINIMAL}model: {{hiden_dim: 8}}\n")
    assert error_of(file, "model.embedding_dim=4").startswith(f"{file}: model.hiden_dim: unknown key")
    file.write_text(f"{MINIMAL}modle: {{hidden_dim: 8}}\n")
    assert error_of(file, "modle.hidden_dim=4").startswith(f"{file}: modle: unknown key")
    file.write_text(f"{MINIMAL}model: 3\n")
    assert error_of(file, "model.hidden_dim=4") == f"{file}: model: expected a section of keys, found 3"


@pytest.mark.parametrize(("content", "key"), [("run: {dir: out}\n", "data.path"), ("data: {path: in}\n", "run.dir")])
def test_a_missing_key_is_named_with_its_meaning(content: str, key: str, file: Path) -> None:
    file.write_text(content)
    section, name = key.split(".")
    assert re.fullmatch(rf"{file}: {key} is missing \(.+\); set it there or as {key}=…", error_of(file))
    assert load_config(file, [f"{key}=here"]).to_dict()[section][name] == "here"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: cannot read the config: No such file or directory"
    assert error_of(tmp_path) == f"{tmp_path}: cannot read the config: Is a directory"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("data: {path: é}".encode("latin-1"))
    assert error_of(latin) == f"{latin}: the config is not UTF-8 text: byte 13 is invalid"
    for content, shown in {"3": "3", "[data, run]": "[data, run]", "text": "text"}.items():
        latin.write_text(content)
        assert error_of(latin) == f"{latin}: expected sections such as `model:`, found {shown}"


def test_the_settings_of_a_table_replace_those_of_all_tables(file: Path) -> None:
    file.write_text(
        "data: {path: d}\nrun: {dir: r}\n"
        "sharding: {exchange: after, cache_load_factor: 0.3, tables: {C1: {exchange: auto}, C2: null}}\n"
    )
    config = load_config(file, ["sharding.tables.C1.rows_dtype=fp16", "sharding.tables.C3.compute_kernels=[fused_uvm]"])
    assert list(config.sharding.tables) == ["C1", "C2", "C3"]
    one = config.sharding.of_table("C1")
    assert (one.exchange, one.rows_dtype, one.cache_load_factor, one.sharding_types) == ("auto", "fp16", 0.3, None)
    assert config.sharding.of_table("C2") == config.sharding.of_table("not named")
    assert config.sharding.of_table("C3").compute_kernels == ("fused_uvm",)
    assert config.sharding.rows_dtypes(["C1", "C2"]) == {"C1": "fp16", "C2": "fp32"}
    config.check_device("cuda")
    with pytest.raises(UserError, match=r"^sharding\.tables\.C3\.compute_kernels names fused_uvm, .*; on a CPU"):
        config.check_device("cpu")
    config.check_tables(["C1", "C2", "C3"])
    with pytest.raises(UserError, match=r"^sharding\.tables: the model has no table 'C2' \(did you mean 'C12'\?\); it"):
        config.check_tables(["C1", "C3", "C12"])


@pytest.mark.parametrize(
    ("settings", "key", "columns"),
    [
        (["model.hidden_dim=2052"], r"model\.hidden_dim", 2052),
        (["model.hidden_dim=null", "model.embedding_dim=4096"], r"model\.embedding_dim", 4096),
        (["model.hidden_dim=4096", "compression.policy=static"], r"model\.hidden_dim", 4096),
        (
            ["model.hidden_dim=4096", "compression.policy=static", "compression.widths=[8,3000]"],
            r"compression\.widths",
            3000,
        ),
        (
            ["model.hidden_dim=32768", "compression.policy=adaptive", "compression.nested=false"],
            r"model\.hidden_dim",
            4096,
        ),
    ],
)
def test_rows_wider_than_the_cuda_kernels_support_are_refused(
    file: Path, settings: list[str], key: str, columns: int
) -> None:
    file.write_text("data: {path: d}\nrun: {dir: r}\n")
    config = load_config(file, settings)
    with pytest.raises(UserError, match=rf"^{key} makes rows of {columns} columns, .* at most 2048"):
        config.check_device("cuda")
    config.check_device("cpu")


def test_rows_of_the_most_columns_that_cuda_supports_are_allowed(file: Path) -> None:
    file.write_text("data: {path: d}\nrun: {dir: r}\n")
    for settings in (
        ["model.hidden_dim=2048"],
        ["model.hidden_dim=64", "model.embedding_dim=4096"],  # no row has as many columns as a vector
        ["model.hidden_dim=4096", "compression.policy=static", "compression.widths=[8,2048]"],
        ["model.hidden_dim=16384", "compression.policy=adaptive", "compression.nested=false"],
    ):
        load_config(file, settings).check_device("cuda")


WRONG_TABLES = {
    "sharding.tables.C1.exchnge=after": r"sharding\.tables\.C1\.exchnge: unknown key \(did you mean 'exchange'\?\)",
    "sharding.tables.C1=after": r"sharding\.tables\.C1: expected a section of keys, found after",
    "sharding.tables=after": r"sharding\.tables: expected sections by name, found after",
    "sharding.tables={1: {}}": r"sharding\.tables: expected a name, found 1; put it in quotes",
    "sharding.tables.C1.exchange=all_to_all": r"sharding\.tables\.C1\.exchange: expected one of auto, after, reduce",
    "sharding.tables.C1.sharding_types=[]": r"sharding\.tables\.C1\.sharding_types is \[\], it must have at least 1",
    "sharding.sharding_types=[column_wise]": r"sharding\.sharding_types: expected a list, each one of row_wise, .*null",
    "sharding.cache_load_factor=1": r"sharding\.cache_load_factor is 1, it must be above 0 and below 1",
    "sharding.data_parallel_up_to_mb=.nan": r"sharding\.data_parallel_up_to_mb is \.nan, it must be at least 0",
    "model.bottom_mlp.C1=3": r"model\.bottom_mlp\.C1: unknown key",
}


@pytest.mark.parametrize("override", WRONG_TABLES)
def test_errors_in_the_settings_of_tables(override: str, file: Path) -> None:
    file.write_text("data: {path: d}\nrun: {dir: r}\n")
    assert re.search(f"command line: {WRONG_TABLES[override]}", error_of(file, override))


def test_a_budget_is_a_share_or_a_size(file: Path) -> None:
    file.write_text(f"{MINIMAL}compression: {{budget: 1e-3}}\n")
    assert load_config(file).compression.budget == 0.001
    for text, expected in {"2": 2.0, "50%": 0.5, "1.7 %": 0.017, "12GB": "12GB", "1.5 GiB": "1.5 GiB"}.items():
        found = load_config(file, [f"compression.budget={text}"]).compression.budget
        assert (found, type(found)) == (expected, type(expected))
    messages = {
        "12G": "expected a number or a size such as 12GB, 4GiB or 50%, found 12G",
        "[1]": r"expected a number or a size such as 12GB, 4GiB or 50%, found \[1\]",
        "null": "expected a number or a size such as 12GB, 4GiB or 50%, found null",
        "-5%": "expected a number or a size such as 12GB, 4GiB or 50%, found -5%",
        "0": "is 0, it must be a finite number above 0",
        "0%": "is 0%, it must be a finite number above 0",
        "12000000000": r"it must be at most 1000000\.0; a size in bytes needs a unit, such as 12GB",
    }
    for text, message in messages.items():
        assert re.search(
            rf"command line: compression\.budget:? ?.*{message}$", error_of(file, f"compression.budget={text}")
        )


def test_the_limits_of_a_tables_widths(file: Path) -> None:
    file.write_text(f"{MINIMAL}compression: {{policy: static, tables: {{C1: {{min_width: 16}}}}}}\n")
    config = load_config(file, ["compression.tables.C2.max_width=32"])
    assert config.compression.limits("C1") == TableCompressionConfig(16, None)
    assert config.compression.limits("C2") == TableCompressionConfig(0, 32)
    assert config.compression.limits("C3") == TableCompressionConfig(0, None)
    config.check_tables(["C1", "C2"])
    with pytest.raises(UserError, match=r"^compression\.tables: the model has no table 'C2'.*; it has C1, C3$"):
        config.check_tables(["C1", "C3"])
    message = error_of(file, "compression.tables.C1.max_width=8")
    assert "compression.tables.C1.min_width is 16, above max_width 8 of the same table" in message
    assert "tables.C1.widht: unknown key" in error_of(file, "compression.tables.C1.widht=8")
    assert "max_width is 6, it must be a multiple of 4; use 4 or 8" in error_of(
        file, "compression.tables.C1.max_width=6"
    )


def test_overrides_replace_values_of_the_file_and_the_last_one_wins(file: Path) -> None:
    file.write_text(f"{MINIMAL}model: {{hidden_dim: 32}}\noptimizer:\n")
    assert load_config(file).model.hidden_dim == 32
    assert load_config(file, ["model.hidden_dim=null"]).model.hidden_dim is None
    assert load_config(file, ["model.hidden_dim=8", "model.hidden_dim=12"]).model.hidden_dim == 12
    rate = load_config(file, ["optimizer.learning_rate=1e-3"]).optimizer.learning_rate
    assert (rate, type(rate)) == (0.001, float)
    assert load_config(file, ["data.path=a=b"]).data.path == "a=b"
    assert load_config(file, ["model.bottom_mlp=[8, 4]"]).model.bottom_mlp == (8, 4)
    assert load_config(file).optimizer == OptimizerConfig()


def test_a_leading_tilde_is_the_home_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    file.write_text("data: {path: ~/logs}\nrun: {dir: out/~/x}\n")
    config = load_config(file)
    assert (config.data.path, config.run.dir) == ("/home/me/logs", "out/~/x")
    assert load_config(file, ["run.dir=~/x"]).run.dir == "/home/me/x"
    assert load_config(file, ["run.dir=./~/x"]).run.dir == "./~/x"


def test_merge_keys_may_be_replaced(file: Path) -> None:
    file.write_text(MINIMAL + "model:\n  <<: {hidden_dim: 32, embedding_dim: 8}\n  embedding_dim: 4\n")
    assert load_config(file).model == ModelConfig(hidden_dim=32, embedding_dim=4)


def test_hidden_dim_below_embedding_dim_is_a_warning(file: Path) -> None:
    (warning,) = load_config(file, ["model.hidden_dim=8", "model.embedding_dim=16"]).warnings()
    assert "\n" not in warning
    assert re.match(r"model\.hidden_dim 8 is below model\.embedding_dim 16: .*Theorem 2\.2", warning)
    for hidden_dim in ("16", "64", "null"):
        assert load_config(file, [f"model.hidden_dim={hidden_dim}", "model.embedding_dim=16"]).warnings() == []


def test_a_buffer_of_less_than_two_batches_is_a_warning(file: Path) -> None:
    settings = ["data.shuffle=true", "data.batch_size=100"]
    (warning,) = load_config(file, [*settings, "data.shuffle_buffer=199"]).warnings()
    assert re.match(
        r"data\.shuffle_buffer 199 holds fewer than two batches of data\.batch_size 100: .*use 200", warning
    )
    assert load_config(file, [*settings, "data.shuffle_buffer=200"]).warnings() == []
    assert load_config(file, ["data.shuffle=false", "data.shuffle_buffer=1"]).warnings() == []


def test_settings_of_compression_without_effect_are_a_warning(file: Path) -> None:
    everything = [
        *("compression.budget=0.3", "compression.alpha=0.4", "compression.widths=[8]", "compression.interval=9"),
        *("compression.shared_rows=false", "compression.tables.C1.max_width=8"),
    ]
    chunks, adaptive = "compression.chunks=4", "compression.policy=adaptive"
    for policy, names in {
        "none": ["budget", "widths", "alpha", "shared_rows", "interval", "tables"],
        "static": ["interval"],
        "adaptive": ["shared_rows"],
    }.items():
        (warning,) = load_config(file, [*everything, f"compression.policy={policy}"]).warnings()
        settings = " and ".join(f"compression.{name}" for name in names)
        verb = "have" if len(names) > 1 else "has"
        assert warning == f"{settings} {verb} no effect, because compression.policy is {policy}"
    for settings_of, warning in {
        (chunks, adaptive): "compression.chunks has no effect, because compression.nested is true",
        (
            chunks,
            adaptive,
            "compression.nested=false",
            "compression.on_move=reset",
        ): "compression.on_move has no effect, because compression.nested is false",
    }.items():
        assert load_config(file, settings_of).warnings() == [warning]
    for quiet in ([], [*everything[:2], "compression.policy=static"], ["compression.preset=fiited"]):
        assert load_config(file, quiet).warnings() == []


def test_settings_of_other_networks_are_a_warning(file: Path) -> None:
    settings = ["model.cross_rank=8", "model.fm_dim=8", "model.query_features=[C1]", "model.bottom_mlp=[8]"]
    for network, names in {
        "dlrm": ["cross_rank", "fm_dim", "query_features"],
        "dlrm_dcn": ["fm_dim", "query_features"],
        "deepfm": ["cross_rank", "query_features"],
        "two_tower": ["cross_rank", "fm_dim", "bottom_mlp"],
    }.items():
        expected = [f"model.{name} has no effect, because model.name is {network}" for name in names]
        assert load_config(file, [*settings, f"model.name={network}"]).warnings() == expected
    assert load_config(file, ["model.arguments.towers=2"]).warnings() == [
        "model.arguments has no effect, because model.builder is null"
    ]
    own = ["model.builder=own:build", "model.arguments.towers=2", "model.fm_dim=8", "model.bottom_mlp=[8]"]
    assert load_config(file, own).warnings() == ["model.fm_dim has no effect, because model.builder is set"]


@pytest.mark.parametrize(("batch", "ranks", "advice"), [(512, 3, "510 or 513"), (2, 3, "3"), (3, 2, "2 or 4")])
def test_a_batch_that_ranks_cannot_share_names_both(batch: int, ranks: int, advice: str, file: Path) -> None:
    config = load_config(file, [f"data.batch_size={batch}"])
    with pytest.raises(UserError) as caught:
        config.check_world_size(ranks)
    assert str(caught.value) == f"data.batch_size {batch} is not a multiple of the {ranks} ranks; use {advice}"
    for number in re.findall(r"\d+", advice):
        load_config(file, [f"data.batch_size={number}"]).check_world_size(ranks)


def test_fp16_rows_that_adam_cannot_update_name_both_settings(file: Path) -> None:
    config = load_config(file, ["sharding.rows_dtype=fp16", "optimizer.name=adam"])
    config.check_device("cuda")
    with pytest.raises(UserError, match=r"^sharding\.rows_dtype is fp16 and optimizer\.name is adam: .*CUDA.*fp32"):
        config.check_device("cpu")
    for setting in ("sharding.rows_dtype=fp32", "optimizer.name=adagrad"):
        load_config(file, ["sharding.rows_dtype=fp16", "optimizer.name=adam", setting]).check_device("cpu")


def test_features_that_are_not_in_the_data_are_named(file: Path) -> None:
    config = load_config(file, ["data.sparse_features=[C1, C22]", "data.dense_features=[I1]"])
    config.check_features(["I1"], ["C1", "C22"])
    with pytest.raises(UserError, match=r"^data\.sparse_features: logs has no column 'C22' .*'C2'\?\); it has C1, C2$"):
        config.check_features(["I1"], ["C1", "C2"])
    with pytest.raises(UserError, match=r"^data\.dense_features: logs has no column 'I1'; it has x, y$"):
        config.check_features(["x", "y"], ["C1", "C22"])


def test_every_number_has_a_range() -> None:
    """A number beyond a float32, an int64 or a timedelta would be a traceback, or a run that never ends."""
    for section in dataclasses.fields(Config):
        for setting in dataclasses.fields(section.type):
            numbers = {int, float} & {setting.type, *typing.get_args(setting.type)}
            if numbers or setting.type == tuple[int, ...]:
                limits = setting.metadata.keys()
                assert {"at_least", "above"} & limits, setting.name
                assert {"at_most", "below"} & limits, setting.name
