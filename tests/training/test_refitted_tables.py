"""Runs that begin with the rows of a run of another budget or policy of compression: every row keeps its vector."""

from pathlib import Path

import pytest
import torch

from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.export.source import ModelSource, Tables
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.stored_tables.refitted_rows import closest_projection, gram_of
from tests.helpers.mlet_command import ROOT, error_line, mlet
from tests.helpers.stored_vectors import expected_vectors, vectors_of
from tests.helpers.train_in_ranks import Ranks, records, stopped_after, tensors, train_in_ranks

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
D = 8
_WIDTHS = "compression.widths=[16,8,4]"
POLICIES = {
    "none": (),
    "static": ("compression.policy=static", "compression.budget=1.1", _WIDTHS),
    "smaller": ("compression.policy=static", "compression.budget=0.4", _WIDTHS),
    "smallest": ("compression.policy=static", "compression.budget=0.25", _WIDTHS),
    "zeros": ("compression.policy=static", "compression.budget=0.4", _WIDTHS, "compression.shared_rows=false"),
    "adaptive": ("compression.policy=adaptive", "compression.budget=1.2", _WIDTHS, "compression.interval=9"),
    "less adaptive": ("compression.policy=adaptive", "compression.budget=0.6", _WIDTHS, "compression.interval=9"),
    "square": ("model.hidden_dim=8",),
    "no wider": (
        "model.hidden_dim=8",
        "compression.policy=static",
        "compression.budget=0.9",
        "compression.widths=[8,4]",
    ),
    "chunks": (
        "compression.policy=adaptive",
        "compression.budget=1.5",
        "compression.nested=false",
        "compression.chunks=2",
        "compression.interval=9",
    ),
}
STEPS = 30


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *small_model,
        "data.batch_size=66",
        f"model.embedding_dim={D}",
        "model.hidden_dim=16",
        "optimizer.learning_rate=0.05",
        f"train.max_steps={STEPS}",
    )


class Runs:
    """Runs of the policies above, trained when they are first asked for."""

    def __init__(self, ranks: Ranks, settings: tuple[str, ...], path: Path) -> None:
        self._ranks, self._settings, self._path = ranks, settings, path

    def __call__(self, policy: str, optimizer: str = "adagrad") -> Path:
        path = self._path / f"{policy}-{optimizer}"
        if not path.exists():
            train_in_ranks(self._ranks, 2, *self.settings(policy, optimizer), f"run.dir={path}")
        return path

    def settings(self, policy: str, optimizer: str = "adagrad") -> tuple[str, ...]:
        return (*self._settings, f"optimizer.name={optimizer}", *POLICIES[policy])


@pytest.fixture(scope="module")
def runs(ranks: Ranks, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, settings, tmp_path_factory.mktemp("policies"))


@pytest.mark.parametrize(
    ("before", "after", "size"),
    [
        ("none", "static", 2),
        ("none", "static", 3),
        ("none", "zeros", 1),
        ("none", "adaptive", 2),
        ("static", "smaller", 2),
        ("static", "none", 3),
        ("static", "adaptive", 1),
        ("zeros", "static", 2),
        ("adaptive", "static", 3),
        ("adaptive", "none", 2),
        ("adaptive", "less adaptive", 3),
        ("no wider", "square", 1),
    ],
)
def test_every_row_keeps_its_vector_and_its_optimizer_state(
    before: str, after: str, size: int, runs: Runs, ranks: Ranks, tmp_path: Path
) -> None:
    """Resumed after its last step, a run takes no step: what it saves is what it began with."""
    old, new = runs(before), tmp_path / "new"
    train_in_ranks(ranks, size, *runs.settings(after), f"run.dir={new}", f"train.resume={old}")
    narrow = exact = 0
    with Tables.open(old) as source, Tables.open(new) as target:
        for name, table in target.tables.items():
            vectors = vectors_of(source.tables[name])
            expected = expected_vectors(vectors, table)
            found = vectors_of(table)
            scale = float(vectors.abs().max())
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * scale)
            if source.tables[name].shared_row is None:
                narrow += int(((found - vectors).abs() > 1e-4 * scale).any(dim=1).sum())
            exact += int(((found - vectors).abs() <= 1e-5 * scale).all(dim=1).sum())
    assert exact
    assert narrow or (before, after) in (
        ("zeros", "static"),
        ("static", "none"),
        ("adaptive", "none"),
        ("no wider", "square"),
    )
    first, second = (_dense_of(path, tmp_path) for path in (old, new))
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)


def _dense_of(run: Path, scratch: Path) -> dict[str, torch.Tensor]:
    return {name: each for name, each in tensors(run, STEPS, scratch).items() if TABLES_PREFIX not in name}


def _rows_of(run: Path, scratch: Path, state: str = "") -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """Return (table, width) -> ids, and their stored rows or optimizer state, but for rows that ids share."""
    found, stored = {}, tensors(run, STEPS, scratch)
    with Tables.open(run) as source:
        for name, table in source.tables.items():
            for part in table.locate(torch.arange(table.num_embeddings)):
                key = part.stored_name.removeprefix("model.")
                rows = stored[f"/optimizer/{key}/{state}" if state else f"/model/{key}"]
                own = part.positions < (table.num_embeddings if table.shared_row is None else table.shared_row)
                found[name, part.width] = part.positions[own], rows[part.stored_rows[own]]
    return found


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        ("none", "static", "adagrad"),
        ("none", "static", "rowwise_adagrad"),
        ("static", "adaptive", "rowwise_adagrad"),
        ("adaptive", "less adaptive", "adagrad"),
    ],
)
def test_rows_that_keep_their_width_keep_every_bit(
    before: str, after: str, optimizer: str, runs: Runs, ranks: Ranks, tmp_path: Path
) -> None:
    old, new = runs(before, optimizer), tmp_path / "new"
    train_in_ranks(ranks, 3, *runs.settings(after, optimizer), f"run.dir={new}", f"train.resume={old}")
    same = moved = 0
    for state in ("", "sum"):
        first, second = (_rows_of(path, tmp_path, state) for path in (old, new))
        for (name, width), (ids, rows) in second.items():
            for (_, old_width), (old_ids, old_rows) in ((key, each) for key, each in first.items() if key[0] == name):
                position = {int(each): index for index, each in enumerate(old_ids)}
                pairs = [(index, position[int(each)]) for index, each in enumerate(ids) if int(each) in position]
                for index, at in pairs:
                    if width == old_width:
                        assert torch.equal(rows[index], old_rows[at])
                        same += 1
                    elif state:
                        expected = old_rows[at].double().mean() * old_width / width
                        torch.testing.assert_close(
                            rows[index].double(), expected.expand(rows[index].shape), rtol=1e-6, atol=0
                        )
                        moved += 1
    assert same
    assert moved


def test_means_of_gradients_follow_the_width(runs: Runs, ranks: Ranks, tmp_path: Path) -> None:
    """Adam's exp_avg is g·W2ᵀ, of which g is known exactly where the old width is d or more."""
    old, new = runs("none", "adam"), tmp_path / "new"
    train_in_ranks(ranks, 1, *runs.settings("static", "adam"), f"run.dir={new}", f"train.resume={old}")
    first, second = (_rows_of(path, tmp_path, "exp_avg") for path in (old, new))
    narrow = 0
    with Tables.open(old) as source, Tables.open(new) as target:
        for (name, width), (ids, rows) in second.items():
            w2 = source.tables[name].projections[16][1].double()
            projections = target.tables[name].projections
            if width == 16 or not len(rows):
                continue
            gradients = first[name, 16][1].double()[ids] @ torch.linalg.pinv(w2).T
            expected = gradients @ projections[width][1].double().T if width in projections else gradients
            torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
            narrow += len(rows)
    assert narrow
    steps = {name: each for name, each in tensors(new, STEPS, tmp_path).items() if name.endswith("/step")}
    assert {float(each) for name, each in steps.items() if "rows_" in name} == {float(STEPS)}


def test_the_rows_of_the_highest_utility_keep_the_widest_slots(runs: Runs, ranks: Ranks, tmp_path: Path) -> None:
    old, new = runs("adaptive"), tmp_path / "new"
    train_in_ranks(ranks, 2, *runs.settings("less adaptive"), f"run.dir={new}", f"train.resume={old}")
    before, after = (tensors(path, STEPS, tmp_path) for path in (old, new))
    prefix = f"/model/{TABLES_PREFIX}row_slots."
    sizes = [table.num_embeddings for table in ModelSpec.load(new / "model.json").tables]
    rows, table_of = sum(sizes), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    utilities = [each[f"{prefix}utilities"].view(-1)[:rows] for each in (before, after)]
    assert torch.equal(*utilities)
    assert int(after[f"{prefix}step"]) == int(before[f"{prefix}step"]) == STEPS
    slots = after[f"{prefix}slots"]
    groups = table_of * slots.shape[1] + torch.arange(rows) % slots.shape[1]  # tables have widths of their own
    stored, compared = slots.view(-1)[:rows] >= 0, 0
    for group in groups.unique():
        own, utility = stored[groups == group], utilities[1][groups == group]
        if bool(own.any()) and not bool(own.all()):
            assert float(utility[own].min()) >= float(utility[~own].max())
            compared += 1
    assert compared


def test_a_row_that_ids_share_has_the_sum_of_their_states(runs: Runs, ranks: Ranks, tmp_path: Path) -> None:
    old, new = runs("none"), tmp_path / "new"
    train_in_ranks(ranks, 2, *runs.settings("smaller"), f"run.dir={new}", f"train.resume={old}")
    before, after, seen = tensors(old, STEPS, tmp_path), tensors(new, STEPS, tmp_path), 0.0
    with Tables.open(new) as target:
        for name, table in target.tables.items():
            if table.shared_row is None:
                continue
            (part,) = (each for each in table.locate(torch.tensor([table.shared_row])) if len(each.positions))
            pool = part.stored_name.removeprefix("model.")
            sums = before[f"/optimizer/{TABLES_PREFIX}embedding_bags.{name}.weight/sum"]
            sums = RowOrder((len(sums),)).from_stored(sums)[table.shared_row :].double()
            expected = float(sums.mean(dim=1).sum()) * 16 / part.width
            found = after[f"/optimizer/{pool}/sum"][part.stored_rows[0]]
            torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-5, atol=1e-12)
            seen += expected
    assert seen > 0


def _sums_by_id(run: Path, scratch: Path) -> tuple[dict[str, torch.Tensor], dict[str, int | None]]:
    """Return the mean sum of squares, times the width, of the row that each id reads, and the shared rows."""
    found, shared, stored = {}, {}, tensors(run, STEPS, scratch)
    with Tables.open(run) as source:
        for name, table in source.tables.items():
            found[name], shared[name] = torch.zeros(table.num_embeddings, dtype=torch.float64), table.shared_row
            for part in table.locate(torch.arange(table.num_embeddings)):
                sums = stored[f"/optimizer/{part.stored_name.removeprefix('model.')}/sum"][part.stored_rows]
                found[name][part.positions] = sums.double().sum(dim=1)
    return found, shared


@pytest.mark.parametrize("after", ["smallest", "static", "none"])
def test_the_state_of_a_shared_row_is_counted_once(after: str, runs: Runs, ranks: Ranks, tmp_path: Path) -> None:
    """It goes to the row that more ids share, or, in equal parts, to ids that have rows of their own from now on."""
    old, new = runs("smaller"), tmp_path / "new"
    train_in_ranks(ranks, 2, *runs.settings(after), f"run.dir={new}", f"train.resume={old}")
    (before, shared_before), (found, shared_after) = (_sums_by_id(path, tmp_path) for path in (old, new))
    compared = 0
    for name, sums in before.items():
        shared, ids = shared_before[name], len(sums)
        if shared is None or float(sums[shared]) == 0:
            continue
        per_id = sums.clone()
        per_id[shared:] /= ids - shared
        expected, now = per_id.clone(), shared_after[name]
        if now is not None:
            expected[now:] = per_id[now:].sum()
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-12)
        compared += now != shared
    assert compared


def test_other_intervals_keep_every_bit(runs: Runs, ranks: Ranks, tmp_path: Path) -> None:
    """Settings that change neither policy nor widths leave all rows where they are, even if they are cut."""
    for policy in ("adaptive", "chunks"):
        old, new = runs(policy), tmp_path / policy
        settings = (*runs.settings(policy), "compression.interval=7", f"run.dir={new}", f"train.resume={old}")
        train_in_ranks(ranks, 2, *settings)
        before, after = (tensors(path, STEPS, tmp_path) for path in (old, new))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            if "/rng/" not in name:
                assert torch.equal(after[name], tensor), name


def test_a_run_does_not_change_its_own_compression(runs: Runs, tmp_path: Path) -> None:
    """Neither where train.resume is still set to the run that it began with, nor from a checkpoint of its own."""
    run = stopped_after(STEPS, runs("static"), tmp_path / "run")
    for path in (runs("none"), run / "checkpoints" / f"step-{STEPS:08d}"):
        line = error_line(
            "train", CONFIG, *runs.settings("smaller"), "train.max_steps=40", f"run.dir={run}", f"train.resume={path}"
        )
        assert "compression.budget was 1.1, is 0.4" in line
        assert "row ranges" not in line
        assert line.endswith("choose another run.dir")
    line = error_line("train", CONFIG, *runs.settings("smaller"), f"run.dir={run}")
    assert f"begin another run with train.resume={run}/checkpoints/step-{STEPS:08d} and another run.dir, or" in line
    line = error_line("train", CONFIG, *runs.settings("smaller"), "train.seed=9", f"run.dir={run}")
    assert "begin another run" not in line


@pytest.mark.parametrize("setting", ["train.resume", "train.initial_weights"])
def test_a_run_is_not_removed_by_the_run_that_begins_with_it(setting: str, runs: Runs, tmp_path: Path) -> None:
    run = stopped_after(STEPS, runs("static"), tmp_path / "run")
    settings = (*runs.settings("smaller"), "train.max_steps=40", f"run.dir={run}", "run.overwrite=true")
    error = mlet("train", CONFIG, *settings, f"{setting}={run}", expect=2).stderr
    assert "is to begin with it, and would remove it first; choose another run.dir" in error
    assert (run / "checkpoints" / f"step-{STEPS:08d}" / ".metadata").exists()


def test_narrow_rows_lose_as_little_as_any_projection_could(runs: Runs) -> None:
    with Tables.open(runs("none")) as source:
        table = max(source.tables.values(), key=lambda each: each.num_embeddings)
        vectors, initial = vectors_of(table)[20:200], torch.randn(3, D, generator=torch.Generator().manual_seed(0))
        w2 = closest_projection(gram_of(table, 20, 200), initial)
    left = vectors - vectors @ torch.linalg.pinv(w2.double()) @ w2.double()
    assert float(left.square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(vectors)[3:].square().sum()), rel=1e-6
    )
    assert float(w2.norm()) == pytest.approx(float(initial.norm()), rel=1e-6)


def test_a_run_that_began_with_other_rows_resumes_as_any_other(runs: Runs, ranks: Ranks, tmp_path: Path) -> None:
    settings = (
        *runs.settings("less adaptive"),
        f"train.resume={runs('static')}",
        f"train.max_steps={STEPS + 20}",
        "train.checkpoint_every=10",
        "train.keep_last=5",
    )
    whole = train_in_ranks(ranks, 2, *settings, f"run.dir={tmp_path / 'whole'}")
    assert whole["first_step"] == STEPS
    copy = stopped_after(STEPS + 10, tmp_path / "whole", tmp_path / "copy")
    resumed = train_in_ranks(ranks, 2, *settings, f"run.dir={copy}")
    assert resumed["first_step"] == STEPS + 10
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert records(copy) == records(tmp_path / "whole")


@pytest.mark.parametrize(
    ("before", "after"), [("none", "static"), ("chunks", "static"), ("adaptive", "adaptive"), ("static", "single")]
)
def test_a_new_run_takes_weights_alone(before: str, after: str, runs: Runs, ranks: Ranks, tmp_path: Path) -> None:
    """With a learning rate of nearly zero, the run ends with what it began with."""
    old, new = runs(before), tmp_path / "new"
    single = after == "single"
    settings = (*runs.settings("none" if single else after), "optimizer.learning_rate=1e-15", "train.max_steps=1")
    settings += ("model.hidden_dim=null",) * single
    train_in_ranks(ranks, 2, *settings, f"run.dir={new}", f"train.initial_weights={old}")
    with Tables.open(old) as source, Tables.open(new) as target:
        for name, table in target.tables.items():
            vectors = vectors_of(source.tables[name])
            expected = expected_vectors(vectors, table)
            scale = float(vectors.abs().max())
            torch.testing.assert_close(vectors_of(table), expected, rtol=1e-5, atol=2e-6 * scale)
    with ModelSource.open(old) as source, ModelSource.open(new) as target:
        for name in source.dense:
            assert torch.equal(source.load_dense(name), target.load_dense(name))


def test_rows_cut_into_chunks_take_no_other_rows_and_give_no_optimizer_state(runs: Runs, tmp_path: Path) -> None:
    new = ("train", CONFIG, f"run.dir={tmp_path / 'new'}", "train.max_steps=40")
    line = error_line(*new, *runs.settings("chunks"), f"train.initial_weights={runs('static')}")
    assert "compression.nested false) cannot begin with the rows of other settings" in line
    line = error_line(*new, *runs.settings("static"), f"train.resume={runs('chunks')}")
    assert "begin with its weights alone (train.initial_weights)" in line


def test_another_width_of_vectors_is_refused_with_the_table(runs: Runs, tmp_path: Path) -> None:
    settings = (*runs.settings("static"), "model.embedding_dim=4", "compression.widths=[8,4]", "model.hidden_dim=8")
    line = error_line(
        "train", CONFIG, f"run.dir={tmp_path / 'new'}", *settings, f"train.initial_weights={runs('none')}"
    )
    assert "has 8 columns as served, and 4 in the model" in line


def test_another_hidden_dim_without_compression_is_refused_with_what_to_do(runs: Runs, tmp_path: Path) -> None:
    settings = (*runs.settings("none"), "model.hidden_dim=24", f"run.dir={tmp_path / 'new'}")
    line = error_line("train", CONFIG, *settings, f"train.initial_weights={runs('none')}")
    assert "model.hidden_dim was 16 there and is 24; without compression it must be the same" in line
