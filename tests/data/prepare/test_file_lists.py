"""Tests of mlet_dist.data.prepare.file_lists: directories, patterns and directories ``key=value``."""

from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.prepare.file_lists import directory_values, expand
from mlet_dist.errors import UserError
from tests.helpers.tables import PLAIN, prepare_table, values_of

NAMES = [
    "part-10.csv",
    "part-2.csv",
    "_SUCCESS",
    ".part-2.csv.crc",
    "day=2/part-0.csv",
    "day=10/part-0.csv",
    "_delta_log/0.json",
    "_day=3/part-0.csv",
]
ORDERED = ["_day=3/part-0.csv", "day=2/part-0.csv", "day=10/part-0.csv", "part-2.csv", "part-10.csv"]


@pytest.fixture(params=["path", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the path or URL of a directory with ``NAMES``."""
    root = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[request.param]
    for name in NAMES:
        with fsspec.open(f"{root}/logs/{name}", "wb", auto_mkdir=True) as file:
            file.write(b"y,x\n1,a\n")
    return root


def below(store: str, files: list[str]) -> list[str]:
    """Return the names of files below logs, as they were listed."""
    return [file.partition("/logs/")[2] for file in files]


def test_a_directory_is_its_files_in_natural_order(store: str) -> None:
    for name in (f"{store}/logs", f"{store}/logs/"):
        files = expand([name])
        assert below(store, files) == ORDERED
        assert all(("://" in file) == ("://" in store) for file in files)
        assert expand(files) == files


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("part-*.csv", ["part-2.csv", "part-10.csv"]),
        ("part-?.csv", ["part-2.csv"]),
        ("part-[0-9]*.csv", ["part-2.csv", "part-10.csv"]),
        ("day=*", ["day=2/part-0.csv", "day=10/part-0.csv"]),
        ("*=*/*.csv", ["_day=3/part-0.csv", "day=2/part-0.csv", "day=10/part-0.csv"]),
        ("**/*.csv", ORDERED),
        ("*", ORDERED),
        ("_SUC*", ["_SUCCESS"]),
    ],
)
def test_patterns(store: str, pattern: str, expected: list[str]) -> None:
    assert below(store, expand([f"{store}/logs/{pattern}"])) == expected


@pytest.mark.parametrize("pattern", ["logs/*.json", "nowhere/*", "logs/part-[a-z].csv"])
def test_a_pattern_without_files_is_named(store: str, pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        expand([f"{store}/{pattern}"])
    assert str(caught.value).startswith(f"{store}/{pattern}: no file matches the pattern")


def test_a_directory_without_files_is_named(store: str) -> None:
    with fsspec.open(f"{store}/empty/_SUCCESS", "wb", auto_mkdir=True) as file:
        file.write(b"")
    with pytest.raises(UserError) as caught:
        expand([f"{store}/logs", f"{store}/empty"])
    assert str(caught.value).startswith(f"{store}/empty: is a directory without raw files")


def test_a_name_that_exists_is_no_pattern(store: str) -> None:
    for name in ("a[1].csv", "a*.csv", "what?.csv"):
        for other in (name, "a1.csv"):
            with fsspec.open(f"{store}/{other}", "wb") as file:
                file.write(b"y,x\n")
        assert expand([f"{store}/{name}"]) == [f"{store}/{name}"]
    assert len(expand([f"{store}/a[[]1].csv"])) == 1


def test_a_relative_path_stays_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs [1]").mkdir()
    (tmp_path / "logs [1]/a.csv").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "logs [1]")
    assert expand(["*.csv", "./*.csv", "../logs [[]1]/*"]) == ["a.csv", "./a.csv", "../logs [1]/a.csv"]
    assert expand(["."]) == ["./a.csv"]


def test_a_chain_of_protocols_keeps_them(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.csv", b"y,x\n1,a\n")
        archive.writestr("two.csv", b"y,x\n0,b\n")
    assert expand([f"zip://*.csv::file://{tmp_path}/a.zip"]) == [
        f"zip://{name}.csv::file://{tmp_path}/a.zip" for name in ("one", "two")
    ]


def test_links_between_directories_end(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.csv").write_bytes(b"")
    (tmp_path / "logs/again").symlink_to(tmp_path / "logs")
    (tmp_path / "link").symlink_to(tmp_path / "logs")
    assert expand([str(tmp_path / "link")]) == [str(tmp_path / "link/a.csv")]


def test_values_of_directories() -> None:
    assert directory_values("s3://b/day=2024-01-01/hour=7/a=b.csv") == [("day", "2024-01-01"), ("hour", "7")]
    assert directory_values("x=a%2Fb%20c/y=__HIVE_DEFAULT_PARTITION__/z=/=1/part") == [
        ("x", "a/b c"),
        ("y", None),
        ("z", ""),
    ]


HIVE: dict[str, Any] = PLAIN | {"sparse": [{"column": "x"}, {"column": "place"}]}


def _hive(root: Path, form: str, extra: str | None = None) -> list[str]:
    """Write a table whose column place is in its directories; return the place of each row."""
    places = []
    for part, place in enumerate(["a%2Fb", "__HIVE_DEFAULT_PARTITION__", "c"]):
        path = root / f"place={place}/part-{part}.{form}"
        path.parent.mkdir(parents=True)
        rows = [{"y": i % 2, "x": f"v{i % 3}", **({} if extra is None else {extra: "z"})} for i in range(8 + part)]
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            path.write_text("\n".join(lines) + "\n")
        places += len(rows) * [{"a%2Fb": "a/b", "c": "c"}.get(place, "")]
    return places


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("name", ["logs", "logs/*/*"])
def test_directories_of_hive_are_columns(tmp_path: Path, form: str, name: str) -> None:
    places = _hive(tmp_path / "logs", form)
    split = {"by": "random", "shares": {"train": 0.5, "test": 0.5}, "seed": 1}
    prepare_table(tmp_path / "out", HIVE | {"format": form, "split": split}, [tmp_path / name])
    found = values_of(tmp_path / "out", "place")
    assert {each: found.count(each) for each in set(found)} == {each: places.count(each) for each in ("a/b", "", "c")}


def test_labels_and_times_may_be_directories(tmp_path: Path) -> None:
    for day, label in (("2024-03-02", 1), ("2024-03-01", 0), ("2024-03-03", 1)):
        path = tmp_path / f"logs/day={day}/clicked={label}/part.csv"
        path.parent.mkdir(parents=True)
        path.write_text("x\n" + (10 if label else 9) * f"{day}\n")
    other = tmp_path / "logs/day=2024-03-01/clicked=1/part.csv"
    other.parent.mkdir()
    other.write_text("x\na\n")
    description = PLAIN | {
        "label": {"column": "clicked"},
        "split": {"by": "time", "column": "day", "shares": {"train": "1/3", "valid": "1/3", "test": "1/3"}},
    }
    schema = prepare_table(tmp_path / "out", description, [tmp_path / "logs"])
    assert (schema.rows["train"], schema.positives) == (10, {"train": 1, "valid": 10, "test": 10})


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_column_of_the_file_and_of_its_path(tmp_path: Path, form: str) -> None:
    _hive(tmp_path / "logs", form, extra="place")
    with pytest.raises(UserError, match=r"part-1\.\w+: column 'place' is in the file and in its path \(place=…\)"):
        prepare_table(tmp_path / "out", HIVE | {"format": form}, [tmp_path / "logs"])
    prepare_table(tmp_path / "out", PLAIN | {"format": form}, [tmp_path / "logs"])  # it is not used


def test_a_file_outside_the_directories(tmp_path: Path) -> None:
    _hive(tmp_path / "logs", "csv")
    (tmp_path / "logs/rest.csv").write_text("y,x\n1,a\n")
    with pytest.raises(UserError, match=r"rest\.csv: line 1: the header has no column 'place'; it has y, x"):
        prepare_table(tmp_path / "out", HIVE, [tmp_path / "logs"])
    description = HIVE | {"header": False, "columns": ["y", "x"]}
    with pytest.raises(UserError, match=r"rest\.csv: column 'place', which the description uses, is neither one of"):
        prepare_table(tmp_path / "out", description, [tmp_path / "logs"])


def test_a_key_that_is_named_twice(tmp_path: Path) -> None:
    path = tmp_path / "place=a/place=b/part.csv"
    path.parent.mkdir(parents=True)
    path.write_text("y,x\n" + 9 * "1,a\n")
    with pytest.raises(UserError, match="the path names place=… more than once"):
        prepare_table(tmp_path / "out", HIVE, [path])


def test_links_that_lead_to_themselves_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").symlink_to("b.csv")
    (tmp_path / "b.csv").symlink_to("a.csv")
    with pytest.raises(UserError, match=r"a\.csv: cannot be read: Too many levels of symbolic links"):
        prepare_table(tmp_path / "out", PLAIN, [tmp_path / "a.csv"])


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(UserError, match=r"s3x://bucket/\*\.csv: cannot be opened: Protocol not known: s3x"):
        expand(["s3x://bucket/*.csv"])
