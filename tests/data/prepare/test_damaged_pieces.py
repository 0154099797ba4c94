"""A finished piece of `mlet prepare` that was damaged is made again, and the data set is the same in the end."""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlet_dist.data.prepare import chunks, raw_blocks
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.passes import Shard
from mlet_dist.data.prepare.pipeline import PASSES, SHARDED, Resources, prepare
from mlet_dist.data.prepare.raw_formats import TableSpec
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.prepare.work_files import WorkDirectory
from mlet_dist.errors import UserError

DESCRIPTION = """
format: csv
label: {column: y}
dense: [{column: n, transform: standardise}, {column: m, transform: log1p}]
sparse:
  - {column: a, min_count: 2}
  - {column: b, encoding: hash, num_embeddings: 50}
  - {column: c, separator: "|"}
split: {by: time, column: t}
"""

# The pieces that each pass leaves, and those among them that the passes after it need.
PIECES = {
    "read": ["read/*/*.arrow", "read/*/done.json"],
    "count": ["count/*/*.run", "count/*/*.json"],
    "vocabulary": ["vocabulary/*/*.lookup", "vocabulary/*/*.parquet", "vocabulary/*/*.json"],
    "write": ["write/*/*.json", "data/*/*/*.parquet"],
}
LEFT = {
    name: [k for before in PIECES for k in PIECES[before] if PASSES.index(before) <= PASSES.index(name)]
    for name in PIECES
}
NEEDED = {
    "read": {"read/*/*.arrow", "read/*/done.json"},
    "count": {"read/*/*.arrow", "read/*/done.json", "count/*/*.run", "count/*/*.json"},
    "vocabulary": {"read/*/*.arrow", "read/*/done.json", "count/*/*.json", *PIECES["vocabulary"]},
    "write": {
        *("read/*/done.json", "count/*/*.json", "vocabulary/*/*.parquet", "vocabulary/*/*.json"),
        *PIECES["write"],
    },
}


def flipped(path: Path, others: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 0x10
    path.write_bytes(content)


def exchanged(path: Path, others: list[Path]) -> None:
    shutil.copyfile(others[0], path)


DAMAGES: dict[str, Callable[[Path, list[Path]], object]] = {
    "a bit flipped": flipped,
    "cut in half": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, _: os.truncate(path, 0),
    "zeros": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path, _: path.write_bytes(path.read_bytes() + b"\0"),
    "another piece": exchanged,
    "a directory": lambda path, _: (path.unlink(), path.mkdir(), (path / "x").mkdir()),
    "deleted": lambda path, _: path.unlink(),
}

Case = tuple[TableSpec, list[Path], dict[str, bytes], dict[str, Path]]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 700)
    monkeypatch.setattr(chunks, "GROUP_ROWS", 40)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Raw files, the data set that they give, and the work directory as each pass leaves it."""
    root, rng = tmp_path_factory.mktemp("case"), random.Random(3)
    (root / "table.yaml").write_text(DESCRIPTION)
    spec, raw = load_table(root / "table.yaml"), []
    for name in ("one.csv", "two.csv"):
        lines = ["t,y,n,m,a,b,c"]
        for _ in range(100):
            items = "|".join(str(rng.randrange(9)) for _ in range(rng.randrange(1, 4)))
            lines.append(
                f"{rng.randrange(10**6)},{rng.randrange(2)},{rng.gauss(5, 2)},{rng.randrange(99)},"
                f"v{min(int(rng.expovariate(0.3)), 20)},{rng.randrange(30)},{items}"
            )
        raw.append(root / name)
        raw[-1].write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_blocks, "BLOCK_BYTES", 700)
        patch.setattr(chunks, "GROUP_ROWS", 40)
        prepare(spec, raw, root / "expected")
        check(root / "expected")
        after = {}
        for name in PASSES[:-1]:
            prepare(spec, raw, root / "out", only=name)
            after[name] = root / f"after-{name}"
            shutil.copytree(root / ".out.prepare", after[name])
    return spec, raw, files_of(root / "expected"), after


def finish(spec: TableSpec, raw: list[Path], out: Path, stage: str, by_passes: bool) -> None:
    """Continue after the pass ``stage``, in one call or in one call for each pass that is left, in shards."""
    if not by_passes:
        prepare(spec, raw, out)
        return
    for name in PASSES[PASSES.index(stage) + 1 :]:
        for shard in [Shard(1, 2), Shard(0, 2)] if name in SHARDED else [None]:
            prepare(spec, raw, out, only=name, shard=shard)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("stage", "kind"), [(s, k) for s in PIECES for k in LEFT[s]])
def test_one_damaged_piece(
    tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture, stage: str, kind: str, damage: str
) -> None:
    spec, raw, expected, after = case
    shutil.copytree(after[stage], tmp_path / ".out.prepare")
    pieces = sorted((tmp_path / ".out.prepare").glob(kind))
    path = pieces[-1]
    DAMAGES[damage](path, pieces[:-1])
    # Alternately in one call or in one for each pass. A record that is missing is a piece of work not done yet, about
    # which a later pass says which pass to run.
    by_passes = len(damage) % 2 == 0 and not (damage == "deleted" and path.suffix == ".json")
    finish(spec, raw, tmp_path / "out", stage, by_passes)
    assert files_of(tmp_path / "out") == expected
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    if kind in NEEDED[stage] and not (damage == "deleted" and path.suffix == ".json"):
        assert [m for m in caplog.messages if re.match(rf"{re.escape(str(path))}: .*; it is made again$", m)], path
    elif kind not in NEEDED[stage]:
        assert caplog.messages == []


@pytest.mark.parametrize("stage", PIECES)
@pytest.mark.parametrize("damage", ["a bit flipped", "cut in half", "deleted"])
def test_all_pieces_damaged_at_once(tmp_path: Path, case: Case, stage: str, damage: str) -> None:
    spec, raw, expected, after = case
    work = tmp_path / ".out.prepare"
    shutil.copytree(after[stage], work)
    pieces = [path for path in sorted(work.rglob("*")) if path.is_file()]
    assert len(pieces) > 8
    for path in pieces:
        DAMAGES[damage](path, pieces)
    prepare(spec, raw, tmp_path / "out", resources=Resources(processes=2))
    assert files_of(tmp_path / "out") == expected
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stage", PIECES)
def test_directories_of_pieces_removed(tmp_path: Path, case: Case, stage: str) -> None:
    spec, raw, expected, after = case
    work = tmp_path / ".out.prepare"
    for removed in sorted(path.relative_to(after[stage]) for path in after[stage].rglob("*") if path.is_dir()):
        shutil.copytree(after[stage], work)
        shutil.rmtree(work / removed)
        prepare(spec, raw, tmp_path / "out")
        assert files_of(tmp_path / "out") == expected, removed
        shutil.rmtree(tmp_path / "out")


def test_pieces_damaged_while_passes_run(
    tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What this process has written itself is verified, too, where it is read."""
    spec, raw, expected, _ = case
    from mlet_dist.data.prepare.passes import Passes

    for name in ("count", "vocabulary", "write"):
        method = getattr(Passes, name)

        def damaged(self: Passes, *args: object, method: Callable[..., None] = method, name: str = name) -> None:
            before = PASSES[PASSES.index(name) - 1]
            flipped(sorted(self.work.root.glob(PIECES[before][0]))[0], [])
            method(self, *args)

        monkeypatch.setattr(Passes, name, damaged)
    prepare(spec, raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected
    assert len(caplog.messages) == 3


def test_a_disk_that_damages_whatever_it_stores(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, raw, _, _ = case
    rename = Path.rename

    def damaging(self: Path, target: Path) -> Path:
        if Path(target).suffix == ".run":
            flipped(self, [])
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", damaging)
    with pytest.raises(UserError, match=r"\.run: .*, though it was made again 2 times; check the disk"):
        prepare(spec, raw, tmp_path / "out")
    monkeypatch.undo()
    assert WorkDirectory(tmp_path / "out").has_finished_files()
