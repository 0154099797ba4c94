"""Training at several widths: steps against a dense float64 reference, on 1 to 3 ranks, resumed, any network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mlet_dist.config.config_file import load_config
from mlet_dist.data.loading.loader import Batch, DataLoader
from mlet_dist.errors import UserError
from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.training.nested_loss import NestedLoss
from tests.helpers.mlet_command import ROOT, error_line
from tests.helpers.rows_by_id import model_by_id
from tests.helpers.train_in_ranks import Ranks, records, stopped_after, tensors, train_in_ranks

pytestmark = pytest.mark.multirank

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
RATE, BATCH = 0.3, 48
DIMS = "model.nested_dims=[4,8]"


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *small_model,
        "model.embedding_dim=12",
        "model.hidden_dim=16",
        DIMS,
        f"data.batch_size={BATCH}",
        f"optimizer.learning_rate={RATE}",
        "train.max_steps=6",
        "train.checkpoint_every=2",
        "train.keep_last=9",
        "train.log_every=2",
    )


def logits_at(state: dict[str, torch.Tensor], spec: ModelSpec, batch: Batch, width: int) -> torch.Tensor:
    """Return the logits of a plain DLRM of ``width`` columns: the first ones of every vector, float64."""

    def linear(name: str, x: torch.Tensor, columns: list[int] | None = None) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return x @ (weight if columns is None else weight[:, columns]).T + state[f"{name}.bias"]

    hidden = linear("dense_arch.model._mlp.0._linear", batch.dense.double()).relu()
    bottom = linear("dense_arch.model._mlp.1._linear", hidden).relu()[:, :width]
    each = [bottom]
    for feature in spec.sparse:
        w1 = state[f"{TABLES_PREFIX}embedding_bags.{feature.name}.weight"]
        w2 = state.get(f"{TABLES_PREFIX}projections.{feature.name}.weight")
        table = (w1 if w2 is None else w1 @ w2)[:, :width]
        each.append(table[batch.sparse[feature.name].values()])
    pairs = [(each[i] * each[j]).sum(1) for i in range(len(each)) for j in range(i + 1, len(each))]
    over = [*range(width), *range(12, 12 + len(pairs))]
    x = linear("over_arch.model.0._mlp.0._linear", torch.cat([bottom, torch.stack(pairs, 1)], 1), over).relu()
    return linear("over_arch.model.1", x).squeeze(1)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, ()),
        (2, ("sharding.exchange=reduce_scatter",)),
        (3, ("sharding.exchange=unique_rows",)),
        (2, ("sharding.exchange=after", "model.nested_loss=sampled")),
        (3, ("model.nested_loss=sampled", "train.pipelined=false")),
        (1, ("model.nested_loss=sampled", "model.hidden_dim=null")),
    ],
)
def test_a_step_follows_the_gradient_of_all_widths(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, world_size: int, changes: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    config = (*settings, "train.max_steps=3", "train.checkpoint_every=1", *changes, f"run.dir={run}")
    train_in_ranks(ranks, world_size, *config)
    spec = ModelSpec.load(run / "model.json")
    before, after = (
        model_by_id(
            {name.removeprefix("/model/"): tensor for name, tensor in tensors(run, step, tmp_path).items()}, spec
        )
        for step in (2, 3)
    )
    data = load_config(CONFIG, config).data.path
    loader = DataLoader(
        Path(data), "train", batch_size=BATCH, rank=0, world_size=1, dense_features=None, sparse_features=None
    )
    batch = next(each for number, each in enumerate(loader) if number == 2)
    state = {name: tensor.double().requires_grad_() for name, tensor in before.items() if name in _trained(before)}
    by_width = {width: logits_at(state, spec, batch, width) for width in (12, 8, 4)}
    if spec.model.nested_loss == "sampled":
        drawn = _widths(spec.seed).drawn(2, 0, BATCH)
        assert set(drawn.tolist()) == {4, 8, 12}
        logits = torch.stack([by_width[int(width)][row] for row, width in enumerate(drawn)])[None]
    else:
        logits = torch.stack(list(by_width.values()))
    functional.binary_cross_entropy_with_logits(logits, batch.labels.double().expand_as(logits)).backward()
    moved = 0
    for name, tensor in state.items():
        assert tensor.grad is not None
        expected = -RATE * tensor.grad
        update = after[name].double() - tensor.detach()
        torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-7)
        moved += int(float(expected.abs().max()) > 1e-5)
    assert moved > 20


def _trained(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if name.startswith((TABLES_PREFIX, "dense_arch.", "over_arch."))]


def _widths(seed: int) -> NestedLoss:
    return NestedLoss(NestedWidths([], None, 12, (4, 8)), True, seed)


def test_widths_are_drawn_by_seed_step_and_row_alone() -> None:
    first, rows = _widths(5), 3000
    drawn = first.drawn(7, 0, rows)
    parts = [first.drawn(7, start, rows // 3) for start in range(0, rows, rows // 3)]
    assert torch.equal(drawn, torch.cat(parts))  # those of three ranks
    for width in (4, 8, 12):
        assert abs(int((drawn == width).sum()) - rows / 3) < 100  # four standard deviations
    for others in (first.drawn(8, 0, rows), _widths(6).drawn(7, 0, rows)):
        assert 0.25 < float((drawn == others).float().mean()) < 0.42


@pytest.mark.parametrize("loss", ["all", "sampled"])
def test_a_resumed_run_is_bitwise_identical_in_both_loops(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, loss: str
) -> None:
    changes = (*settings, f"model.nested_loss={loss}", "optimizer.name=adagrad", "train.validate_every=3")
    whole = train_in_ranks(ranks, 2, *changes, f"run.dir={tmp_path / 'whole'}", "train.pipelined=true")
    run = stopped_after(4, tmp_path / "whole", tmp_path / "run")
    again = train_in_ranks(ranks, 2, *changes, f"run.dir={run}", "train.pipelined=false")
    assert again["first_step"] == 4
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert records(run) == records(tmp_path / "whole")
    (valid, *_) = [record for record in records(run) if record["split"] == "valid"]
    names = {"auc", "logloss", "auc_dim4", "logloss_dim4", "auc_dim8", "logloss_dim8"}
    assert names <= valid.keys()
    assert len({valid["logloss"], valid["logloss_dim4"], valid["logloss_dim8"]}) == 3
    for split in ("valid", "test"):
        assert {f"{split}_{name}" for name in names} <= again.keys()
        assert again[f"{split}_logloss_dim4"] == pytest.approx(whole[f"{split}_logloss_dim4"], abs=1e-9)


def test_the_number_of_ranks_changes_nothing_but_rounding(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path
) -> None:
    changes = (*settings, "model.nested_loss=sampled", "optimizer.learning_rate=0.02")
    found = [train_in_ranks(ranks, size, *changes, f"run.dir={tmp_path / str(size)}") for size in (1, 2, 3)]
    for each in found[1:]:
        for name in ("test_logloss", "test_logloss_dim8", "test_logloss_dim4"):
            assert each[name] == pytest.approx(found[0][name], abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        ("model.builder=tests.helpers.own_networks:wide_and_deep",),
        ("model.name=dlrm_dcn", "model.cross_rank=4", "model.nested_loss=sampled"),
        ("optimizer.name=adagrad", "compression.policy=static", "compression.budget=0.4"),
        ("train.precision=bf16",),
        ("train.on_non_finite=skip",),
    ],
)
def test_other_networks_and_settings_train_at_several_widths(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, changes: tuple[str, ...]
) -> None:
    once = train_in_ranks(ranks, 2, *settings, *changes, f"run.dir={tmp_path / 'run'}")
    assert len({once["test_logloss"], once["test_logloss_dim8"], once["test_logloss_dim4"]}) == 3


def test_sequences_are_masked_too(ranks: Ranks, tmp_path: Path) -> None:
    from tests.helpers.tables import PLAIN, prepare_table

    lines = ["y,item,seen", *(f"{row % 2},{row % 7},{'|'.join(map(str, range(row % 4)))}" for row in range(600))]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    seen = {"column": "seen", "separator": "|", "table": "item"}
    prepare_table(tmp_path / "data", PLAIN | {"sparse": [{"column": "item"}, seen]}, [tmp_path / "a.csv"])
    found: list[dict[str, Any]] = [
        train_in_ranks(
            *(ranks, size, f"data.path={tmp_path / 'data'}", f"run.dir={tmp_path / str(size)}", "data.batch_size=48"),
            *("model.builder=docs.din_network:build", "model.sequences=[seen]", "model.embedding_dim=8"),
            "model.arguments={candidate: item, history: seen, max_length: 4, hidden: 8}",
            *("model.nested_dims=[4]", "model.hidden_dim=16", "train.max_steps=8", "optimizer.learning_rate=0.05"),
        )
        for size in (1, 2)
    ]
    assert found[0]["test_logloss_dim4"] != found[0]["test_logloss"]
    assert found[0]["test_logloss_dim4"] == pytest.approx(found[1]["test_logloss_dim4"], abs=1e-6)


def test_a_network_that_reads_rows_elsewhere_is_one_line(small_model: tuple[str, ...], tmp_path: Path) -> None:
    line = error_line(
        *("train", CONFIG, *small_model, "model.embedding_dim=8", "model.nested_dims=[4]", f"run.dir={tmp_path / 'r'}"),
        "model.builder=tests.helpers.own_networks:counts_ids",
    )
    assert "model.nested_dims: forward of the module failed with each row repeated for every width" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.nested_dims=[8,4]",), r"model.nested_dims is \[8, 4\]; name each width once, in ascending order"),
        (("model.nested_dims=[4,4]",), r"model.nested_dims is \[4, 4\]; name each width once, in ascending order"),
        (("model.nested_dims=[8,16]",), r"\[8, 16\], which must be below model.embedding_dim 16, a width of the"),
        (("model.nested_dims=[6]",), "model.nested_dims.*multiple of 4"),
        (
            ("model.nested_dims=[8]", "model.name=dlrm_dcn", "model.tables.C3.embedding_dim=32"),
            r"model.nested_dims is \[8\], and model.tables.C3.embedding_dim is 32: widths are those of all tables",
        ),
    ],
)
def test_widths_that_do_not_fit_are_refused(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(CONFIG, ["data.path=d", "run.dir=r", *changes])


def test_a_loss_without_widths_has_no_effect() -> None:
    config = load_config(CONFIG, ["data.path=d", "run.dir=r", "model.nested_loss=sampled"])
    assert "model.nested_loss has no effect, because model.nested_dims is null" in config.warnings()


def test_widths_are_part_of_a_run(ranks: Ranks, settings: tuple[str, ...], tmp_path: Path) -> None:
    train_in_ranks(ranks, 1, *settings, f"run.dir={tmp_path / 'run'}")
    plain = [each for each in settings if each != DIMS]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    run = stopped_after(4, tmp_path / "run", tmp_path / "again")
    with pytest.raises(Exception, match=r"model.nested_dims was \[4, 8\], is null"):
        train_in_ranks(ranks, 1, *plain, f"run.dir={run}")
    # A run that begins from another may change them.
    found = train_in_ranks(ranks, 1, *plain, f"run.dir={tmp_path / 'other'}", f"train.resume={run}")
    assert found["first_step"] == 4
    assert found["weights_sha256"] != summary["weights_sha256"]
