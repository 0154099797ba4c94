"""Lists that must agree when something is added; CONTRIBUTING.md has the recipes."""

import inspect
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from mlet_dist import cli
from mlet_dist.cli.main import main, parse
from mlet_dist.config.sharding_section import ShardingConfig, TableShardingConfig
from mlet_dist.data.prepare import raw_formats
from mlet_dist.data.prepare.raw_formats import TableSpec
from mlet_dist.embeddings.sharded.exchange_choice import (
    COMM_OPS,
    EXCHANGES,
    EXCHANGES_OF,
    Exchange,
    ExchangeChoice,
)
from mlet_dist.errors import UserError
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.outputs import OUTPUTS
from mlet_dist.export.verify.tolerances import DEFAULT_TOLERANCES


def literals(config: type, setting: str) -> set[str]:
    """The words that a setting takes, wherever they stand in its type."""

    def words(kind: object) -> set[str]:
        return {kind} if isinstance(kind, str) else {word for each in get_args(kind) for word in words(each)}

    return words(get_type_hints(config)[setting])


def test_every_exchange_can_be_asked_for_and_serves_a_sharding_type() -> None:
    assert set(get_args(ExchangeChoice)) == {"auto", *EXCHANGES}
    assert literals(ShardingConfig, "exchange") == literals(TableShardingConfig, "exchange") == {"auto", *EXCHANGES}
    assert set(COMM_OPS) == set(get_args(Exchange)) == {each for kinds in EXCHANGES_OF.values() for each in kinds}


def test_every_sharding_type_can_be_asked_for() -> None:
    expected = {*EXCHANGES_OF, "data_parallel"}
    assert literals(ShardingConfig, "sharding_types") == literals(TableShardingConfig, "sharding_types") == expected


def test_every_command_s_file_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(inspect.getfile(cli)).parent
    files = {path.stem for path in folder.glob("*.py") if re.search(r"^TEXT = ", path.read_text(), re.MULTILINE)}
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert files == set(listed)


@pytest.mark.parametrize("name", [*OUTPUTS, "package"])
def test_every_output_can_be_exported(name: str) -> None:
    assert parse(["export", "run", "--out", "out", "--outputs", name]).outputs == [name]


@pytest.mark.parametrize("name", [name for name, encoding in ENCODINGS.items() if encoding.is_quantised])
def test_every_encoding_is_an_output_with_a_tolerance(name: str) -> None:
    assert OUTPUTS[name].encoding is ENCODINGS[name]
    assert parse(["export", "run", "--out", "out", "--package-tables", name]).package_tables == name
    verify = ["verify", "export", "--run", "run", "--data", "data", "--auc-tolerance", f"{name}=0.5"]
    assert parse(verify).auc_tolerance == [(name, 0.5)]
    assert 0 < DEFAULT_TOLERANCES.auc[name] < 0.1


def test_every_raw_format_can_be_prepared() -> None:
    made = {
        name
        for name, function in inspect.getmembers(raw_formats, inspect.isfunction)
        if get_type_hints(function).get("return") is TableSpec
    }
    for name in [*made, "table"]:
        assert parse(["prepare", name, "raw", "--out", "out"]).format == name
    with pytest.raises(UserError, match="nonsense") as refused:
        parse(["prepare", "nonsense", "raw", "--out", "out"])
    assert set(re.findall(r"choose from (.*?)\)", str(refused.value))[0].replace("'", "").split(", ")) == {
        *made,
        "table",
    }
