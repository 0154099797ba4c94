"""`mlet spectrum`: its numbers equal those of a singular value decomposition, and its page shows them."""

import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.export.factorize.run_factorize import factorize_tables
from mlet_dist.export.row_blocks import read_blocks
from mlet_dist.export.source import Tables
from mlet_dist.export.spectrum.run_spectrum import spectrum_of
from mlet_dist.export.spectrum.singular_values import Spectrum, balance, suggest_dim, suggest_smaller
from mlet_dist.export.spectrum.spectrum_page import html_page
from mlet_dist.export.spectrum.spectrum_report import NOTE
from mlet_dist.pages.page_shell import SERIES
from tests.conftest import TrainedRun
from tests.helpers.data_set_parts import write_schema
from tests.helpers.mlet_command import mlet
from tests.helpers.resealed import reseal_yaml

_GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_GENERATOR)


def _spectrum(table: torch.Tensor) -> Spectrum:
    return Spectrum.of_gram(table.double().T @ table.double(), len(table))


@pytest.mark.parametrize(
    ("table", "below_floor"),
    [
        (_random(300, 16), 0),
        (_random(300, 16).half(), 0),
        (_random(300, 16) * torch.logspace(0, -5, 16), 0),
        (_random(300, 16).double() * torch.logspace(0, -15, 16, dtype=torch.float64), 8),
        (_random(300, 5) @ _random(5, 16), 11),
        (_random(7, 16), 0),
        (_random(1, 16), 0),
        (_random(16, 1), 0),
        (torch.zeros(20, 16), 16),
    ],
)
def test_singular_values_equal_those_of_torch(table: torch.Tensor, below_floor: int) -> None:
    expected = torch.linalg.svdvals(table.double())
    found = _spectrum(table)
    assert len(found.singular_values) == min(table.shape)
    values = torch.tensor(found.singular_values, dtype=torch.float64)
    # They are exact to the reported floor: the Gram matrix squares the condition number.
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=5e-8 * float(expected[0]))
    known = expected > 1e-6 * expected[0]
    torch.testing.assert_close(values[known], expected[known], rtol=1e-3, atol=0)
    assert found.below_floor == below_floor


def test_the_numbers_of_a_spectrum_equal_those_computed_by_hand() -> None:
    found = _spectrum(torch.diag(torch.tensor([8.0, 4.0, 0.5, 0.05])))
    assert found.counts == {"0.1": 2, "0.01": 3, "0.001": 4}
    shares = [8 / 12.55, 4 / 12.55, 0.5 / 12.55, 0.05 / 12.55]
    assert found.effective_rank == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert found.stable_rank == pytest.approx((64 + 16 + 0.25 + 0.0025) / 64)
    assert found.energy_dims == {"90%": 2, "99%": 2}
    assert found.loss(0) == 1
    assert found.loss(1) == pytest.approx(math.sqrt(16.2525 / 80.2525))
    assert found.loss(4) == 0
    even = _spectrum(torch.eye(10))
    assert (even.effective_rank, even.stable_rank) == (pytest.approx(10), pytest.approx(10))
    assert even.energy_dims == {"90%": 9, "99%": 10}
    zero = _spectrum(torch.zeros(3, 4))
    assert (zero.effective_rank, zero.stable_rank, zero.loss(0)) == (0, 0, 0)
    assert zero.counts == {"0.1": 0, "0.01": 0, "0.001": 0}
    assert zero.energy_dims == {"90%": 0, "99%": 0}


def test_the_loss_is_that_of_the_best_low_rank_approximation() -> None:
    table = _random(200, 12).double() * torch.logspace(0, -2, 12, dtype=torch.float64)
    left, values, right = torch.linalg.svd(table, full_matrices=False)
    for dims in (4, 8):
        truncated = left[:, :dims] * values[:dims] @ right[:dims]
        expected = float((truncated - table).norm() / table.norm())
        assert _spectrum(table).loss(dims) == pytest.approx(expected, rel=1e-6)
    wanted = next(dims for dims in (4, 8, 12) if _spectrum(table).loss(dims) <= 0.1)
    assert suggest_dim(_spectrum(table), 12) == wanted < 12
    assert suggest_dim(_spectrum(torch.eye(12)), 12) == 12
    assert suggest_dim(_spectrum(_random(9, 3)), 3) == 3


def test_a_smaller_table_is_suggested_by_the_weighted_spectrum() -> None:
    narrow, wide = _spectrum(torch.diag(torch.tensor([1.0] * 4 + [0.01] * 8))), _spectrum(torch.eye(12))
    assert suggest_smaller(wide, None, 12) == {"embedding_dim": 12, "loss": 0, "weighted_loss": None}
    losses = {"loss": pytest.approx(math.sqrt(8 / 12)), "weighted_loss": pytest.approx(math.sqrt(8e-4 / 4.0008))}
    assert suggest_smaller(wide, narrow, 12) == {"embedding_dim": 4, **losses}
    assert suggest_smaller(narrow, wide, 12) == {"embedding_dim": 12, "loss": 0, "weighted_loss": 0}


def test_the_balance_is_the_distance_between_the_layers_gram_matrices() -> None:
    rows, projection = _random(30, 6).double(), _random(6, 4)
    found = balance(rows.T @ rows, projection)
    one, other = rows.T @ rows, projection.double() @ projection.double().T
    assert found["absolute"] == pytest.approx(float((one - other).norm()))
    assert found["relative"] == pytest.approx(float((one - other).norm() / one.norm()))
    assert balance(torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 4)) == {"absolute": 0, "relative": 0}


def _rows_of(parts: list[Path], column: str) -> np.ndarray:
    return np.concatenate([pq.read_table(part)[column].to_numpy() for part in parts])


def test_a_run_is_weighted_by_its_training_split(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlet_dist.export.row_blocks.BLOCK_BYTES", 50 * 8 * 12)  # fifty rows
    result = spectrum_of(trained.path)
    assert result["note"] == NOTE
    assert result["data"] == str(trained.data)
    assert result["recipe_gain"] == pytest.approx(12 * 0.25**2)
    assert [table["name"] for table in result["tables"]] == [f"C{index}" for index in range(1, 27)]
    with Tables.open(trained.path) as run:
        for name in ("C3", "C9"):
            table, found = run.tables[name], next(each for each in result["tables"] if each["name"] == name)
            assert table.projection is not None
            rows = torch.cat([block for _, block in read_blocks(table)])
            product = rows @ table.projection.double()
            expected = torch.linalg.svdvals(product)
            values = torch.tensor(found["plain"]["singular_values"], dtype=torch.float64)
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-7 * float(expected[0]))
            ids = _rows_of(sorted((trained.data / "train").glob("*.parquet")), name)
            counts = np.bincount(ids, minlength=table.num_embeddings)
            weighted = torch.linalg.svdvals(product[torch.from_numpy(ids).long()])  # a row for each occurrence
            values = torch.tensor(found["weighted"]["singular_values"], dtype=torch.float64)
            torch.testing.assert_close(values, weighted, rtol=1e-9, atol=1e-7 * float(weighted[0]))
            assert found["rows_seen"] == (counts > 0).sum()
            assert (found["num_embeddings"], found["hidden_dim"], found["embedding_dim"]) == (len(counts), 12, 4)
            factors = torch.linalg.svdvals(table.projection.double()).square()
            gains = {"min": float(factors.min()), "mean": float(factors.mean()), "max": float(factors.max())}
            assert found["gains"] == pytest.approx(gains)
            # One product here, a sum over blocks there: the order of a float64 sum shows in its last bits.
            assert found["balance"] == pytest.approx(balance(rows.T @ rows, table.projection), rel=1e-12)


def test_an_export_and_factors_have_the_spectrum_of_their_run(
    trained: TrainedRun, exported: Path, tmp_path: Path
) -> None:
    factorize_tables(exported, 4, tmp_path / "factors")
    of_run, of_export = spectrum_of(trained.path), spectrum_of(exported)
    of_factors = spectrum_of(tmp_path / "factors", data=str(trained.data))
    assert spectrum_of(tmp_path / "factors")["not_weighted"].startswith("no --data was given")
    for one, *others in zip(of_run["tables"], of_export["tables"], of_factors["tables"], strict=True):
        for other in others:
            for kind in ("plain", "weighted"):
                values = other[kind]["singular_values"]
                np.testing.assert_allclose(values, one[kind]["singular_values"], rtol=1e-5, atol=1e-6 * values[0])
        assert one["balance"]["relative"] > 0.1  # since k > d and W2 has unit gain
        assert others[0]["balance"] is None
        if others[1]["plain"]["below_floor"] == 0:
            assert others[1]["balance"]["relative"] < 1e-6


def test_data_of_other_tables_are_rejected_and_missing_data_of_the_run_ignored(
    trained: TrainedRun, exported: Path, small_data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(small_data, tmp_path / "data")
    schema = json.loads((copy / "schema.json").read_text())
    schema["sparse"][2]["num_embeddings"] += 1
    write_schema(copy, schema)
    with pytest.raises(UserError, match=r"feature 'C3' has 301 ids here"):
        spectrum_of(exported, data=str(copy))
    run = shutil.copytree(trained.path, tmp_path / "run")
    reseal_yaml(run / "config.yaml", lambda text: text.replace(str(trained.data), str(tmp_path / "gone")))
    result = spectrum_of(run)
    assert result["data"] is None
    assert "gone: no such data set" in result["not_weighted"]
    assert all(table["weighted"] is None and table["rows_seen"] is None for table in result["tables"])


def test_ids_are_counted_by_the_vocabulary_or_in_the_data(small_data: Path, tmp_path: Path) -> None:
    schema = DatasetSchema.load(small_data)
    feature = schema.sparse[2]
    ids = _rows_of(sorted((small_data / "train").glob("*.parquet")), feature.name)
    expected = np.bincount(ids, minlength=feature.num_embeddings)
    np.testing.assert_array_equal(count_ids(small_data, schema, feature.name), expected)
    copy = shutil.copytree(small_data, tmp_path / "data")
    (copy / "vocabulary").mkdir()
    counts = np.arange(1, feature.num_embeddings)[::-1] // 100
    pq.write_table(pa.table({"value": ["x"] * len(counts), "count": counts}), copy / "vocabulary" / "C3.parquet")
    found = count_ids(copy, schema, feature.name)
    np.testing.assert_array_equal(found[1:], counts)
    assert found[0] == len(ids) - counts.sum()  # id 0 stands for values outside the vocabulary
    pq.write_table(pa.table({"value": ["x"], "count": [1]}), copy / "vocabulary" / "C3.parquet")  # of other data
    np.testing.assert_array_equal(count_ids(copy, schema, feature.name), expected)


class _Parser(html.parser.HTMLParser):
    """Collects tags, their attributes and the text of a page, and asserts that all tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.values: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [f"{name}={value}" for name, value in attrs]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [f"{name}={value}" for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _result(count: int) -> dict[str, Any]:
    """Return a result with ``count`` tables: ordinary, wide, rank-deficient, of few rows, and of zeros."""
    tables = []
    for index in range(count):
        d = (16, 32, 64, 128, 4)[index % 5]
        table = _random((300, 7, 30, 200, 1)[index % 5], d) * torch.logspace(0, -1 - index % 7, d) * (index != 10)
        plain, weighted = (_spectrum(each) for each in (table, table * _random(len(table), 1) ** 4))
        tables.append(
            {
                "name": f"a_table_with_a_rather_long_name_{index}" if index % 9 == 0 else f"C{index}<b>",
                "num_embeddings": len(table),
                "hidden_dim": 64 if index % 2 else None,
                "embedding_dim": d,
                "plain": vars(plain),
                "weighted": vars(weighted),
                "suggested": {"embedding_dim": suggest_dim(weighted, d), "loss": 0.25, "weighted_loss": 0.05},
                "gains": {"min": 0.5, "mean": 1.0, "max": 2.0} if index % 2 else None,
                "balance": {"absolute": 2.0, "relative": 0.5} if index % 2 else None,
            }
        )
    about = {"source": "runs/<script>x</script>", "data": "data/criteo", "not_weighted": None, "floor": 1e-7}
    return {**about, "recipe_gain": 4.0, "tables": tables}


@pytest.mark.parametrize("count", [1, 26, 200])
def test_the_page_is_self_contained_and_has_a_plot_per_table(count: int) -> None:
    text = html_page(_result(count))
    parsed = _Parser()
    parsed.feed(text)
    parsed.close()
    assert parsed.tags.count("svg") == parsed.tags.count("section") == count
    assert parsed.tags.count("tr") == 1 + count
    assert NOTE in "".join(parsed.text)
    assert not {"script", "img", "link", "iframe"} & set(parsed.tags)  # names are escaped, too
    assert parsed.tags.count("b") == 0
    assert not [value for value in parsed.values if re.match(r"(src|href)=(?!#)", value)]
    assert "http" not in text
    assert "@import" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        _, _, width, height = map(float, re.search(r'viewBox="([^"]*)"', svg)[1].split())
        for path in re.findall(r'<path d="(M [^"]*)"[^>]*style="fill: none', svg):
            numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]
            assert all(0 <= x <= width for x in numbers[::2])
            assert all(0 <= y <= height for y in numbers[1::2])


_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(_BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("count", "height"), [(26, 4200), (200, 27_000)])
def test_a_browser_draws_every_plot(tmp_path: Path, count: int, height: int) -> None:
    (tmp_path / "page.html").write_text(html_page(_result(count)), encoding="utf-8")
    command = [str(_BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size=1300,{height}"]
    command += [f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert pixels.shape == (height, 1300, 3)

    def where(colour: str) -> np.ndarray:
        wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
        return (abs(pixels - wanted) < 12).all(axis=2)

    # Charts are in three columns, and captions separate the curves of a plot from those above and below.
    points, plots = where(SERIES[0]) | where(SERIES[1]), 0
    for column in range(3):
        rows = np.flatnonzero(points[360:, 90 + column * 378 + 40 : 90 + column * 378 + 350].any(axis=1))
        plots += 1 + int((np.diff(rows) > 60).sum())
    assert abs(plots - count) <= count // 5  # plots of tables of one row or of zeros have few pixels
    assert (pixels[-300:] < 100).any()  # the table of numbers is at the bottom
    assert not (pixels[:, -4:] < 200).any()  # nothing exceeds the page's width


@pytest.mark.e2e
def test_the_command_prints_a_table_and_writes_a_page(trained: TrainedRun, tmp_path: Path) -> None:
    text = mlet("spectrum", trained.path, "--out", tmp_path / "page").stdout
    assert re.search(r"^C3 +300 +12 +4 ", text, re.MULTILINE)
    assert "kσ² of the recipe: 0.75" in text
    assert NOTE in text
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["spectrum.html", "spectrum.json"]
    assert (tmp_path / "page" / "spectrum.html").read_text(encoding="utf-8").count("<svg") == 26
    written = json.loads((tmp_path / "page" / "spectrum.json").read_text())
    assert written == json.loads(json.dumps(spectrum_of(trained.path)))
    with pytest.raises(UserError, match="exists and is not empty"):
        spectrum_of(trained.path, out=tmp_path / "page")
