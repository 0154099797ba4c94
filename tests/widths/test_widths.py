"""`mlet widths`: what it reads from runs that are compressed, and its page."""

import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mlet_dist.models.spec import ModelSpec
from mlet_dist.widths.widths_page import html_page
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json
from tests.helpers.train_in_ranks import Ranks, records, train_in_ranks

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
ADAGRAD = ("optimizer.name=adagrad", "optimizer.learning_rate=0.05", "train.log_every=20")
ADAPTIVE = ("compression.policy=adaptive", "compression.budget=0.9", "compression.widths=[12,4]")


def _train(ranks: Ranks, path: Path, *settings: str) -> tuple[Path, dict[str, Any]]:
    return path, train_in_ranks(ranks, 2, *settings, *ADAGRAD, f"run.dir={path}")


@pytest.fixture(scope="module")
def static(
    ranks: Ranks, small_model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    settings = ("compression.policy=static", "compression.budget=0.6", "compression.widths=[12,4]")
    return _train(ranks, tmp_path_factory.mktemp("static") / "run", *small_model, *settings)


@pytest.fixture(scope="module")
def adaptive(
    ranks: Ranks, small_model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("adaptive") / "run"
    return _train(ranks, path, *small_model, *ADAPTIVE, "compression.interval=9")


@pytest.mark.multirank
def test_the_widths_of_a_static_run_are_those_of_its_tables(
    static: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, result = static
    page = tmp_path / "widths.html"
    found = mlet_json("widths", path, "--out", page)
    for name in ("training_bytes", "single_layer_training_bytes"):
        assert found[name] == result[{"training_bytes": "training_bytes_peak"}.get(name, name)]
    assert found["budget_bytes"] == int(0.6 * result["single_layer_training_bytes"])
    assert found["rank_peak_memory_bytes"] == result["timing"]["rank_peak_memory_bytes"]
    assert (found["finished"], found["history"], found["interval"]) == (True, [], None)
    spec = ModelSpec.load(path / "model.json")
    total = sum(table.num_embeddings for table in spec.tables)
    assert [table["name"] for table in found["tables"]] == [table.name for table in spec.tables]
    rows: dict[int, float] = defaultdict(float)
    lookups: dict[int, float] = defaultdict(float)
    for table in found["tables"]:
        own: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for of, width, share in spec.row_ranges[table["name"]]:  # the shared row is a range of its own
            own[width][0] += of / table["num_embeddings"]
            own[width][1] += share
            rows[width] += of / total
            lookups[width] += share / len(found["tables"])  # each has one id a row of data
        shares = {each["width"]: [each["rows"], each["lookups"]] for each in table["widths"]}
        assert shares == {width: pytest.approx(each) for width, each in own.items()}
    assert set(rows) == {12, 4, 0}
    of_all = {each["width"]: (each["rows"], each["lookups"]) for each in found["widths"]}
    assert of_all == {width: (pytest.approx(rows[width]), pytest.approx(lookups[width])) for width in rows}
    assert page.read_text().count("<svg") == 2 + len(found["tables"])
    text = mlet("widths", path).stdout
    assert f"tables in training    {found['training_bytes']:,} bytes" in text
    (line,) = (line.split() for line in text.splitlines() if line.startswith("C3 "))
    shares_of_c3 = {each["width"]: f"{each['rows']:.1%}" for each in found["tables"][2]["widths"]}
    assert line[2:] == [shares_of_c3.get(width, "-") for width in (12, 4, 0)]


@pytest.mark.multirank
def test_an_adaptive_run_shows_what_moved_also_while_it_trains(
    adaptive: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, result = adaptive
    found = mlet_json("widths", path)
    lines = [record for record in records(path) if record["split"] == "compression"]
    assert [each["step"] for each in found["history"]] == [record["step"] for record in lines] == [20, 40, 57]
    first, second, last = found["history"]
    assert second["moves"] > first["moves"] > 0
    assert second["moves_per_pass"] == pytest.approx((second["moves"] - first["moves"]) / 20 * 9)
    assert last["kept"] == pytest.approx(result["kept_share"])
    # By table and by first width, it is the same rows that have columns.
    sizes = {table["name"]: table["num_embeddings"] for table in found["tables"]}
    starts = {each["width"]: each["rows"] * sum(sizes.values()) for each in found["widths"]}
    for each in found["history"]:
        kept = sum(share * sizes[name] for name, share in each["kept"].items())
        assert kept == pytest.approx(sum(share * starts[int(width)] for width, share in each["kept_by_width"].items()))
    assert last["kept_by_width"]["12"] >= last["kept_by_width"]["0"] > 0  # those without columns got some

    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    (copy / "summary.json").unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "spl')  # being written
    early = mlet_json("widths", copy)
    assert early["finished"] is False
    assert early["history"] == found["history"]
    assert early["training_bytes"] == found["training_bytes"] <= found["budget_bytes"]
    (copy / "metrics.jsonl").write_text("")
    begun = mlet_json("widths", copy, "--out", tmp_path / "begun.html")
    assert (begun["history"], begun["rank_peak_memory_bytes"]) == ([], None)
    assert "The run has not finished" in (tmp_path / "begun.html").read_text()


@pytest.mark.e2e
def test_what_cannot_be_shown_is_refused(ranks: Ranks, small_model: tuple[str, ...], tmp_path: Path) -> None:
    assert f"{tmp_path}: not a run of `mlet train`" in error_line("widths", tmp_path)
    path = tmp_path / "run"
    train_in_ranks(ranks, 1, *small_model, f"run.dir={path}")
    assert f"{path}: compression.policy of this run is none" in error_line("widths", path)
    assert "name a file that ends in .html" in error_line("widths", path, "--out", "widths.txt")


def _result(count: int, steps: int, chunks: bool = False) -> dict[str, Any]:
    """Return a result with ``count`` tables and ``steps`` records, whose names and shares are at their limits."""
    names = [f"a_rather_long_name_of_a_table_{index}" if index % 9 == 0 else f"C{index}<b>" for index in range(count)]
    widths = [{"width": width, "rows": 0.2, "lookups": 1.0 if width == 64 else 0.0} for width in (64, 16, 8, 4, 0)]
    history = [
        {
            "step": 10 + step,
            "moves": 3 * step,
            "moves_per_pass": 0 if step == 0 else 10.0 ** (step % 10),
            "kept": {name: (step % 3) / 2 for name in names},
            "kept_by_width": {64: 1.0, 16: 1.0, 8: 0.5, 4: 0.5, 0: 0.0},
        }
        for step in range(steps)
    ]
    return {
        "run": "runs/<script>x</script>", "policy": "adaptive" if steps else "static", "finished": False,
        "single_layer_training_bytes": 10**12, "budget_bytes": 10**11, "training_bytes": 99,
        "rank_peak_memory_bytes": [10**9, 2 * 10**12], "widths": widths, "chunks": chunks,
        "interval": 100 if steps else None, "history": history,
        "tables": [{"name": name, "num_embeddings": 4, "widths": widths[:3]} for name in names],
    }  # fmt: skip


@pytest.mark.parametrize(("count", "steps"), [(1, 0), (26, 1), (26, 200), (60, 30)])
def test_the_page_is_self_contained_and_plots_stay_inside(count: int, steps: int) -> None:
    page = html_page(_result(count, steps))
    assert not re.search(r"(?:src|href)=\"(?!#)|url\(|<script|@import|http", page)
    assert "&lt;script&gt;" in page
    assert "<b>" not in page  # names are escaped
    plots = _plots(page)
    assert len(plots) == 2 + count + (2 + count) * bool(steps)
    for plot in plots:
        _, _, width, height = map(float, plot.attrib["viewBox"].split())
        places = [(float(each.attrib["x"]), float(each.attrib["y"])) for each in plot.iter(f"{SVG}text")]
        places += [place for path in plot.findall(f".//{SVG}g/{SVG}path") for place in _places(path)]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_shares_are_drawn_where_the_scale_says() -> None:
    result = _result(1, 3)
    result["tables"][0]["name"] = name = "C1"
    for each, share in zip(result["history"], (0.0, 0.5, 1.0), strict=True):
        each["kept"] = {name: share}
    plots = _plots(html_page(result))
    scale = dict(zip(_texts(plots[-1]), _grid(plots[-1]), strict=False))
    assert [scale[label] for label in ("0%", "50%", "100%")] == [y for _, y in _titled(plots[-1], "100%")]
    corners = {
        title: [x for x, _ in _titled(plots[0], title)]
        for title in ("64 columns: 20.0% of rows", "4 columns: 20.0% of rows", "64 columns: 100.0% of lookups")
    }
    widths = [max(each) - min(each) for each in corners.values()]
    assert widths == [pytest.approx(each, rel=1e-4) for each in (widths[2] / 5, widths[2] / 5, widths[2])]


@pytest.mark.parametrize(
    "shares", [(1.0, 1.0, 0.98, 0.5, 0.49), (0.02, 0.01, 0.0, 0.0, 0.0), (0.6, 0.0, 0.0, 0.3, 0.0)]
)
def test_names_at_the_ends_of_lines_do_not_overlap(shares: tuple[float, ...]) -> None:
    result = _result(1, 3)
    for each in result["history"]:
        each["kept_by_width"] = dict(zip((64, 16, 8, 4, 0), shares, strict=True))
    plot = _plots(html_page(result))[2]
    height = float(plot.attrib["viewBox"].split()[3])
    names = [each for each in plot.iter(f"{SVG}text") if "font-size: 8px" in each.attrib["style"]]
    places = sorted(float(each.attrib["y"]) for each in names)
    assert {each.text for each in names} == {"64", "16", "8", "4", "0"}
    assert min(np.diff(places)) >= 8  # the size of their font
    assert 0 <= places[0] <= places[-1] <= height


SVG = "{http://www.w3.org/2000/svg}"


def _plots(page: str) -> list[ElementTree.Element]:
    # Browsers take SVG within HTML without the declaration.
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    return [ElementTree.fromstring(svg.replace("<svg", f'<svg xmlns="{SVG[1:-1]}"', 1)) for svg in found]


def _places(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])]


def _titled(plot: ElementTree.Element, title: str) -> list[tuple[float, float]]:
    """Return the points of what has a title."""
    (found,) = (each for each in plot.iter(f"{SVG}g") if each.findtext(f"{SVG}title") == title)
    path = found.find(f"{SVG}path")
    assert path is not None
    return _places(path)


def _texts(plot: ElementTree.Element) -> list[str | None]:
    """Return the numbers beside the upright axis."""
    return [each.text for each in plot.iter(f"{SVG}text") if "%" in (each.text or "")]


def _grid(plot: ElementTree.Element) -> list[float]:
    """Return the y of the horizontal lines of the grid."""
    lines = [_places(each) for each in plot.iter(f"{SVG}path") if "var(--rule)" in each.attrib.get("style", "")]
    return [line[0][1] for line in lines if len(line) == 2 and line[0][1] == line[1][1]]
