"""What an export carries makes of raw rows, in Python and C++, the bits that `mlet prepare` makes of them."""

import importlib.util
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.hashing import hash_texts, salt_of
from mlet_dist.data.prepare import vocabulary_file
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.prepare.typed_columns import log1p_float32
from mlet_dist.data.prepare.vocabulary_file import read_vocabulary
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.carried_preprocessing import PROGRAMS, carry

ROOT = Path(__file__).parents[3]
DRIVER = ROOT / "tests" / "helpers" / "raw_rows_driver.cpp"

Rows = Sequence[Mapping[str, Any]]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Rows], list[str]]:
    """``driver(preprocessing, rows)`` encodes rows in C++, and returns the lines of ``raw_rows_driver.cpp``."""
    if shutil.which("g++") is None:
        pytest.skip("requires a C++ compiler")
    program = tmp_path_factory.mktemp("driver") / "driver"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{PROGRAMS}"]
    subprocess.run(["g++", *flags, DRIVER, "-o", program], check=True, timeout=300)

    def run(preprocessing: Path, rows: Rows) -> list[str]:
        file = program.with_name("rows.json")
        file.write_text(json.dumps([{name: _tagged(value) for name, value in row.items()} for row in rows]))
        done = subprocess.run([program, preprocessing, file], capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode(errors="replace").splitlines()

    return run


def _tagged(value: Any) -> list[Any]:
    if value is None:
        return ["n"]
    if isinstance(value, list):
        return ["l", [_tagged(each) for each in value]]
    if isinstance(value, bool):
        return ["b", value]
    if isinstance(value, str):
        return ["t", value]
    return ["i", str(value)] if isinstance(value, int) else ["d", value.hex() if np.isfinite(value) else str(value)]


def encoder_of(preprocessing: Path) -> tuple[ModuleType, Any]:
    """Import the carried ``raw_rows.py``; return the module and its encoder of the directory."""
    found = importlib.util.spec_from_file_location("raw_rows", preprocessing / "raw_rows.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module, module.RawRows(preprocessing)


def line_of(encoder: Any, row: Mapping[str, Any], invalid: type[Exception]) -> str:
    """Encode a row in Python; return the line that the driver prints for it, without a reason."""
    try:
        found = encoder.encode([row])
    except invalid:
        return "invalid"
    bits = [np.array(each, np.float32).view(np.uint32).tolist() for each in (found.dense[0], found.weights or [])]
    assert [float(np.float32(each)) for each in found.dense[0]] == found.dense[0]  # exact, without more digits
    return _line(bits[0], found.ids, [each for [each] in found.lengths], bits[1])


def _line(dense: list[int], ids: list[int], lengths: list[int], weights: list[int]) -> str:
    named = {"dense": dense, "ids": ids, "lengths": lengths, "weights": weights}
    return " ".join(" ".join([name, *map(str, values)]) for name, values in named.items())


def lines_of(data: Path, split: str) -> list[str]:
    """Return the lines that the driver should print for the rows of a prepared split."""
    schema = DatasetSchema.load(data)
    table = pa.concat_tables([pq.read_table(data / part.path) for part in schema.parts[split]])
    dense = [table[name].to_numpy().view(np.uint32).tolist() for name in schema.dense]
    ids = [table[f.name].to_pylist() for f in schema.sparse]
    weighted = any(feature.weighted for feature in schema.sparse)
    weights = [table[f"{f.name}.weight"].to_pylist() if f.weighted else None for f in schema.sparse]
    lines = []
    for row in range(table.num_rows):
        lists = [each[row] if isinstance(each[row], list) else [each[row]] for each in ids]
        of_ids = [
            np.array(each[row] if each is not None else [1.0] * len(found), np.float32).view(np.uint32).tolist()
            for each, found in zip(weights, lists, strict=True)
        ]
        flat = [each for found in lists for each in found], [each for found in of_ids for each in found]
        lines.append(_line([each[row] for each in dense], flat[0], [*map(len, lists)], flat[1] if weighted else []))
    return lines


def test_hashes_are_those_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "raw_values.md").read_text()
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `C1` |")]
    assert len(rows) >= 5
    module = _programs()
    for salt, text, digits in ([cell.strip().strip("`") for cell in row] for row in rows):
        plain = {"(empty)": ""}.get(text, text)
        expected = int(digits, 16)
        assert int(hash_texts(pa.array([plain]), salt)[0]) == expected
        assert module.hash_text(plain.encode(), int(salt_of(salt))) == expected


def _programs() -> ModuleType:
    found = importlib.util.spec_from_file_location("raw_rows", PROGRAMS / "raw_rows.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_logarithms_are_rounded_from_their_exact_values() -> None:
    """Where they are almost halfway between two float32 numbers, a logarithm in float64 decides by chance."""
    floats = np.geomspace(1e-6, 88, 400).astype(np.float32)
    halfway = (floats.astype(np.float64) + np.nextafter(floats, np.float32(np.inf)).astype(np.float64)) / 2
    near = np.expm1(halfway)
    numbers = np.concatenate([near, [0.0, -0.0, -1.0, 1e-40, 1e-46, 3.4e38], np.arange(300.0)])
    found = log1p_float32(numbers)
    module = _programs()
    assert found.tolist() == [module.log1p(float(each)) for each in numbers]
    assert not np.signbit(found).any()
    assert (found != np.log1p(np.maximum(numbers, 0)).astype(np.float32)).sum() > 50
    assert (found[len(near) + 6 :] == np.log1p(np.arange(300.0)).astype(np.float32)).all()


DESCRIPTION = """
format: jsonl
label: {column: y}
dense:
  - {column: n, transform: raw}
  - {column: raw, transform: raw}
  - {column: log}
  - {column: int, integer: true, missing: 3}
  - {column: std, transform: standardise, missing: mean}
  - {column: std2, transform: standardise, missing: refuse, missing_values: ["-1", "none"]}
  - {column: log2, missing: 0.3, missing_values: ["0", "NA"]}
sparse:
  - {column: text, min_count: 2}
  - {column: hashed, encoding: hash, num_embeddings: 1000003}
  - {column: whole, cast: integer}
  - {column: whole2, cast: integer, missing_values: ["-1", "x"]}
  - {column: any, cast: text, encoding: hash, num_embeddings: 97, missing_values: ["?"]}
  - {column: tags, separator: "|", max_len: 3}
  - {column: spaced, separator: " ", encoding: hash, num_embeddings: 1009}
  - {column: commas, separator: ", ", encoding: hash, num_embeddings: 1009}
  - {column: pairs, separator: ";", weight_separator: ":", max_len: 2, keep: last}
  - {column: bare, multi_valued: true, cast: integer, missing_values: ["2"]}
  - {column: list, separator: "|", weights: of_list, encoding: hash, num_embeddings: 1009, max_len: 2}
"""
PLAIN = {
    "raw": "1.5", "log": "7", "int": "4", "std": "2", "std2": "3", "log2": "9", "text": "a", "hashed": "b",
    "whole": "7", "whole2": "8", "any": "c", "tags": "x|y", "spaced": "p q", "commas": "1, 2", "pairs": "u:1;v:0.5",
    "bare": ["1", "2"], "list": "k|l", "of_list": "0.25|2",
}  # fmt: skip
TEXT_COLUMNS = [name for name in PLAIN if name not in ("bare", "of_list")]
TEXTS = [
    *("", " ", "\u3000", "a", "b", " a", "a ", "A", "never seen", "ä", "日本語", "𝄞 clef", "e\u0301", "\u00e9"),
    *("x" * 300, "NaN", "nan", "-nan", "NULL", "null", "None", "\\N", "N/A", "?", "-", "--", ".", "missing"),
    *("m\u0130ss\u0130ng", "un\u212anown", "undefined", "NAT", "true", "True", "FALSE", "false", " true "),
    *("yes", "none", "x", "NA", "\u00a0\\N", "0", "-0", "+0", "00", "0.0", "-0.0", "7", "07", "+7", "7.0"),
    *("7.", "7.5", " 7 ", "7,5", "-7", "-1", "-1.0", "--1", "1e3", "1E+3", "1e-3", "1e", "e3", ".5", "5."),
    *("+.5", "1e400", "-1e400", "1e1234", "0x10", "1_000", "٣", "1 2", "½", "3.4028234663852886e38"),
    *("3.4028235677973366e38", "3.41e38", "1e-45", "1e-46", "9007199254740993", "12345678901234567890", "0.1"),
    *("0.30000000000000004", "inf", "-inf", "Infinity", "1.7976931348623157e308", "100000000000000000000000"),
    *("16777217", "x|y", "x||y", "|x", "x|", "|", "||", "x|y|z|w", " x | y ", "x|\\N|y", "x y", "x  y", "a, b"),
    *("a,b", "a,  b", "1|2|3", "[]", "[ ]", "[1]", "[1, 2]", "[1,2]", " [1 2] ", "[1  2\n3]", "[1 2 x]"),
    *("['a', 'b']", "['a' 'b']", '["a", "b"]', "['a' ' ' 'b']", "['a' '' 'b']", "['a, b']", "['a|b']"),
    *("[a, 'b']", "['a]", "[']", "[a'b']", "[[1], 2]", "[1, 2", "1, 2]", "[None, 1, nan]", "[null]"),
    *("['None', <NA>]", "[1 | 2]", "[x|y]", "[ 1,2 ,3 ]", "\u00a0[1, 2]\u3000", "['\n', 'b']", "[1,,2]", "a:1"),
    *("a:1;b:2", "a:1;b:2;c:3", "a", "a:", ":1", "a:x", "a:nan", "a:b:2", " a : 1 ; b:2", "a:1;;b:2", ";"),
    *("a:1e39", ":", "0.5|1", "1", "1|2|3", "|1", "nan|2", "NULL|2", "[0.5, 2]", "[0.5 2]", "1|x", "1e39|1"),
    *("\t", "a\tb", "\x1c", "\x1f7\x1f", "\x0b", "\ufeff7", "\u200b", "7\u2028", "\u2029", "\u0085", "\u1680x"),
    *("\u180e", "\x00", "a\x00b"),
]  # fmt: skip


def with_each(column: str, value: Any) -> dict[str, Any]:
    row = dict(PLAIN) | {column: value}
    if column == "list":
        row["of_list"] = "1|2" if isinstance(value, str) and value.count("|") == 1 else "3"
    return row


def write_lines(path: Path, rows: Rows) -> Path:
    lines = [json.dumps({"y": number % 2, "n": number, **row}) for number, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of JSON lines whose vocabularies hold most of ``TEXTS``, some of them below ``min_count``."""
    path = tmp_path_factory.mktemp("first")
    (path / "table.yaml").write_text(DESCRIPTION)
    rows = 2 * [with_each("text", text) for text in TEXTS[::2]]
    rows += [with_each(column, text) for column in TEXT_COLUMNS for text in TEXTS[::2]]
    rows += [dict(PLAIN) | {"text": text, "std": f"{number / 7}"} for number, text in enumerate(TEXTS[::3])]
    spec = load_table(path / "table.yaml")
    data = prepare_all(spec, write_lines(path / "rows.jsonl", rows), path / "data")
    carry(LikeDataset.open(str(data)), path / "carried")
    return path


def prepare_all(spec: Any, raw: Path, out: Path, like: Path | None = None) -> Path:
    """Prepare a file of which any number of lines may be malformed; like another data set, all rows are test."""
    spec = replace(spec, max_malformed=1.0)
    if like is None:
        prepare(spec, [raw], out)
    else:
        prepare(spec, {"test": [raw]}, out, like=LikeDataset.open(str(like)))
    return out


def compare(driver: Callable[[Path, Rows], list[str]], preprocessing: Path, rows: Rows, prepared: Path) -> int:
    """Compare rows, which have their numbers in column n, with what was prepared; return how many are invalid."""
    schema = DatasetSchema.load(prepared)
    numbers = [
        int(each)
        for part in schema.parts["test"]
        for each in pq.read_table(prepared / part.path, columns=["n"])["n"].to_pylist()
    ]
    expected = ["invalid"] * len(rows)
    for number, line in zip(numbers, lines_of(prepared, "test"), strict=True):
        expected[number] = line
    module, encoder = encoder_of(preprocessing)
    in_python = [line_of(encoder, row, module.InvalidRow) for row in rows]
    for row, wanted, python, cpp in zip(rows, expected, in_python, driver(preprocessing, rows), strict=True):
        assert (python, cpp) == (wanted, wanted), {k: v for k, v in row.items() if v != PLAIN.get(k)}
    return expected.count("invalid")


def test_every_kind_of_text_in_every_column(
    first_day: Path, driver: Callable[[Path, Rows], list[str]], tmp_path: Path
) -> None:
    rows = [with_each(column, text) for column in TEXT_COLUMNS for text in TEXTS]
    rows += [with_each("bare", [text, "3", None]) for text in TEXTS]
    rows = [{"n": number, **row} for number, row in enumerate(rows)]
    like = LikeDataset.open(str(first_day / "data"))
    raw = write_lines(tmp_path / "rows.jsonl", rows)
    prepared = prepare_all(like.description, raw, tmp_path / "data", like=first_day / "data")
    invalid = compare(driver, first_day / "carried", rows, prepared)
    assert 400 < invalid < len(rows) / 2


NUMBERS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "integers": (pa.int64(), [7, 0, -1, 3, 2**53 + 1, 2**63 - 1, -(2**63), None]),
    "doubles": (
        pa.float64(),
        [
            *(7.0, 7.5, -0.0, -1.0, 2.0**53, 2.0**54, 1e16, 123456.789, 1e-7, 5e-324, 0.1, 3.5e38, 1e300, 1e22),
            *(9999999999999998.0, math.nan, math.inf, -math.inf, None),
        ],
    ),
    "booleans": (pa.bool_(), [True, False, None]),
    "texts": (pa.string(), TEXTS),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_values_of_other_types_than_text(
    first_day: Path, driver: Callable[[Path, Rows], list[str]], tmp_path: Path, kind: str
) -> None:
    """The columns of a Parquet file, all of one type, hold a plain value of it but for one column of each row."""
    dtype, values = NUMBERS[kind]
    if dtype == pa.string():
        plain: dict[str, Any] = {**PLAIN, "bare": "[1, 2]"}
        rows = [plain | {column: value} for column in [*TEXT_COLUMNS, "bare"] for value in values]
    else:
        first = values[0]
        plain = dict.fromkeys(PLAIN, first) | {"pairs": ["a:1"], "bare": [first], "list": [first, first]}
        plain |= {"of_list": [0.5, 1.0]} | ({"tags": "x", "spaced": "x", "commas": "x"} if first is True else {})
        single = [name for name, value in plain.items() if value is first]
        rows = [plain | {column: value} for column in single for value in values]
        rows += [plain | {"bare": [value, first]} for value in values]
        rows += [plain | {"list": [value, first]} for value in values]
    rows = [{"n": number, **row} for number, row in enumerate(rows)]
    arrays = {"y": pa.array([number % 2 for number in range(len(rows))])}
    for name in rows[0]:
        arrays[name] = pa.array([row[name] for row in rows])
    pq.write_table(pa.table(arrays), tmp_path / "rows.parquet")
    like = LikeDataset.open(str(first_day / "data"))
    spec = replace(like.description, text=None)
    prepared = prepare_all(spec, tmp_path / "rows.parquet", tmp_path / "data", like=first_day / "data")
    compare(driver, first_day / "carried", rows, prepared)


def test_a_vocabulary_is_read_back_and_a_broken_one_is_one_error(first_day: Path, tmp_path: Path) -> None:
    file = first_day / "carried" / "text.vocabulary"
    values = pq.read_table(first_day / "data" / "vocabulary" / "text.parquet")["value"].to_pylist()
    assert read_vocabulary(file).to_pylist() == values
    assert len(values) > 50
    for content in (file.read_bytes()[:-1], b"", b"x" * 60, file.read_bytes()[:23]):
        (tmp_path / "text.vocabulary").write_bytes(content)
        with pytest.raises(UserError, match="is damaged, or is no vocabulary"):
            read_vocabulary(tmp_path / "text.vocabulary")


def test_values_that_share_a_hash_have_their_own_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_file, "hash_texts", lambda texts, salt: np.full(len(texts), 7, np.uint64))
    with (tmp_path / "t.vocabulary").open("wb") as file:
        vocabulary_file.write_vocabulary(file, "t", pa.array(["b", "a", "", "c"]))
    module = _programs()
    monkeypatch.setattr(module, "hash_text", lambda text, salt: 7)
    table = module._Table(tmp_path, {"salt": "0", "num_embeddings": 5, "vocabulary": "t.vocabulary"})
    assert [table.id_of(text) for text in ["b", "a", "", "c", "d"]] == [1, 2, 3, 4, 0]
