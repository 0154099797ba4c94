import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mlet_dist import comparison as compare_module
from mlet_dist.comparison import arm_configs, compare, single_layer_compression
from mlet_dist.comparison_report import comparison_report, comparison_table
from mlet_dist.config.compression_section import CompressionConfig, TableCompressionConfig
from mlet_dist.config.config_file import Config, load_config
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec
from mlet_dist.report.run_report import report
from mlet_dist.training.run_directory import RunDirectory
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def test_three_arms_are_trained_exported_and_verified(small_model: tuple[str, ...], tmp_path: Path) -> None:
    base = tmp_path / "comparison"
    overrides = [*small_model, "train.max_steps=5", "optimizer.learning_rate=0.1", f"run.dir={base}"]
    printed = mlet("compare", CONFIG, *overrides).stdout
    result = json.loads((base / "comparison.json").read_text())
    assert result["ok"] is True
    assert list(result["arms"]) == ["single", "mlet", "control"]
    arms = result["arms"]
    # k = 12 and σ = 0.25: kσ² = 0.75, σ√k = 0.866.
    control = yaml.safe_load((base / "control.yaml").read_text())
    assert control["optimizer"]["rows_learning_rate"] == pytest.approx(0.1 * 0.75)
    assert control["model"]["rows_init_gain"] == pytest.approx(0.75**0.5)
    assert control["model"]["hidden_dim"] is None
    assert yaml.safe_load((base / "mlet.yaml").read_text())["model"]["hidden_dim"] == 12
    assert arms["single"]["trained_table_bytes"] == arms["control"]["trained_table_bytes"]
    assert arms["mlet"]["trained_table_bytes"] > 3 * arms["single"]["trained_table_bytes"]
    assert len({arm["served_table_bytes"] for arm in arms.values()}) == 1
    assert len({arm["weights_sha256"] for arm in arms.values()}) == 3
    assert all(arm["max_abs_logit_diff"] < 1e-5 for arm in arms.values())

    table = (base / "comparison.md").read_text()
    assert printed.startswith(table.strip())
    assert table.strip() == comparison_table(result)
    assert f"{arms['mlet']['test_auc']:.4f}" in table
    differences = {each["of"]: each for each in result["differences"]}
    assert list(differences) == ["single", "control"]
    for other, each in differences.items():
        assert each["arm"] == "mlet"
        assert each["logloss"]["value"] == pytest.approx(
            arms["mlet"]["test_logloss"] - arms[other]["test_logloss"], abs=1e-6
        )
        assert each["auc"]["low"] < each["auc"]["value"] < each["auc"]["high"]
    assert "- MLET against single layer: LogLoss " in table
    result, _ = report([base], tmp_path / "report")
    assert list(result["arms"]) == list(arms)
    for output in result["outputs"]:
        assert output["output"] == "dcp"
        for split in ("valid", "test"):
            mean = output[split]["logloss"]["mean"]
            assert mean == pytest.approx(arms[output["arm"]][f"{split}_logloss"], abs=1e-6)
    assert result["advice"][0].startswith(
        "Do not bother: no output that was measured is smaller than the float32 tables of the single"
    )
    (of_mlet,) = (each for each in result["outputs"] if each["arm"] == "mlet")
    found, shown = of_mlet["test"]["logloss"]["difference"], differences["single"]["logloss"]
    assert (found["low"], found["high"]) == pytest.approx((shown["low"], shown["high"]), abs=1e-9)
    # Single runs have the metrics of training alone.
    runs, _ = report([base / "single", base / "mlet"], tmp_path / "runs")
    assert runs["recommended"] is None
    assert runs["advice"][0].startswith("There is no recommendation, because there are no predictions of single rows")


class Commands:
    """Replaces the commands: writes the files that they would write, and stops before the command ``stop``."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str]] = []
        self.stop: tuple[str, str] | None = None
        self.arm = dict(ARM)
        self.logits = {name: [-1.0, 1.0, -1.0, 1.0] for name in ("single", "single_compressed", "mlet", "control")}

    def __call__(self, command: str, target: str, *rest: str) -> dict[str, Any]:
        done = (command, Path(target).stem)
        if done == self.stop:
            raise KeyboardInterrupt
        self.ran.append(done)
        if command == "train":
            config = load_config(Path(target))
            run = RunDirectory(Path(config.run.dir))
            schema = DatasetSchema.load(Path(config.data.path))
            with run.lock(config):
                run.prepare(config, ModelSpec.of(config, schema))
                run.finish(self.arm)
        if command == "export":
            out = Path(rest[rest.index("--out") + 1])
            out.mkdir()
            (out / "manifest.json").write_text('{"format_version": 2, "model": {}}')
        if command == "verify":
            scores = Path(rest[rest.index("--scores") + 1])
            scores.mkdir(parents=True)
            columns = {"logit": self.logits[Path(target).stem], "label": [0.0, 1.0, 0.0, 1.0]}
            pq.write_table(pa.table(columns), scores / "dcp.parquet")
        verified = {"ok": True, "outputs": {"dcp": {"max_abs_logit_diff": 0.0}}}
        return verified if command == "verify" else self.arm


def test_compressed_arms_have_the_budget_and_the_single_layer_has_not(
    small_model: tuple[str, ...], tmp_path: Path
) -> None:
    base = tmp_path / "comparison"
    compressed = ("compression.policy=static", "compression.budget=40KB", "compression.widths=[12,8,4]")
    limits = "compression.tables={C3: {min_width: 8}, C4: {min_width: 4, max_width: 12}}"
    overrides = [*small_model, *compressed, limits, "optimizer.name=adagrad", "train.max_steps=5", f"run.dir={base}"]
    result = mlet_json("compare", CONFIG, *overrides)
    assert result["ok"] is True
    arms = result["arms"]
    assert list(arms) == ["single", "single_compressed", "mlet"]
    single = arms["single"]["training_bytes_peak"]
    assert single == arms["single"]["single_layer_training_bytes"]
    for name in ("single_compressed", "mlet"):
        assert arms[name]["training_bytes_peak"] <= 40_000
        assert arms[name]["single_layer_training_bytes"] == single
    assert arms["mlet"]["training_bytes_peak"] > 39_000
    settings = {name: yaml.safe_load((base / f"{name}.yaml").read_text()) for name in arms}
    assert [each["model"]["hidden_dim"] for each in settings.values()] == [None, None, 12]
    assert [each["compression"]["policy"] for each in settings.values()] == ["none", "static", "static"]
    assert settings["single_compressed"]["compression"] | {"widths": None, "tables": None} == (
        settings["mlet"]["compression"] | {"widths": None, "tables": None}
    )
    assert settings["single_compressed"]["compression"]["widths"] == [4]
    assert settings["single_compressed"]["compression"]["tables"] == {
        "C3": {"min_width": 4, "max_width": None},
        "C4": {"min_width": 4, "max_width": 4},
    }
    assert arms["mlet"]["kept_share"]["C3"] == arms["single_compressed"]["kept_share"]["C3"] == 1

    lines = (base / "comparison.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert cells[0][:4] == ["", "tables in training", "share", "tables served"]
    assert [row[0] for row in cells[2:]] == ["single layer", "single layer, compressed", "MLET, compressed"]
    assert cells[2][2] == "100.0%"
    assert cells[4][2] == f"{arms['mlet']['training_bytes_peak'] / single:.1%}"
    assert "There is no control" in "\n".join(lines)
    # A report recommends by the predictions of valid.
    found, _ = report([base], tmp_path / "report", margin=0.5)
    assert found["recommended"]["arm"] in ("single_compressed", "mlet")
    assert found["verdict"] == "holds"


def test_the_arms_of_tables_of_their_own_sizes(settings: Callable[..., Config]) -> None:
    own = 'model.tables={"C?": {embedding_dim: 8, hidden_dim: 32}, C20: {hidden_dim: null}}'
    found = {}
    for deviation in ("null", "0.25"):
        config = settings("model.name=dlrm_dcn", "model.hidden_dim=64", f"model.projection_init_std={deviation}", own)
        schema = DatasetSchema.load(Path(config.data.path))
        arms = arm_configs(config, ModelSpec.of(config, schema))
        for name, arm in arms.items():
            tables = {table.name: table for table in ModelSpec.of(arm, schema).tables}
            assert {each.embedding_dim for key, each in tables.items() if len(key) == 2} == {8}
            small = {each.hidden_dim for key, each in tables.items() if len(key) == 3 and each.num_embeddings <= 64}
            found[name, deviation] = tables["C3"], tables["C20"], small
    for deviation, of_small in (("null", {None}), ("0.25", {64, None})):
        assert {each.hidden_dim for name in ("single", "control") for each in found[name, deviation][:2]} == {None}
        assert [each.hidden_dim for each in found["mlet", deviation][:2]] == [32, None]
        assert found["mlet", deviation][2] == of_small
    gains = [each.settings.rows_init_gain for each in found["control", "0.25"][:2]]
    assert gains == [pytest.approx(0.25 * 32**0.5), 1.0]


@pytest.mark.parametrize(
    ("widths", "expected"),
    [(None, None), ((64, 32, 16, 8), (16, 8)), ((64, 8, 4), (16, 8, 4)), ((64,), (16,)), ((16,), (16,))],
)
def test_the_widths_of_a_compressed_single_layer(
    widths: tuple[int, ...] | None, expected: tuple[int, ...] | None
) -> None:
    given = CompressionConfig(policy="static", budget=0.3, widths=widths, tables={"C1": TableCompressionConfig(64, 64)})
    found = single_layer_compression(given, {"C1": 16, "C2": 16})
    assert found == CompressionConfig(
        policy="static", budget=0.3, widths=expected, tables={"C1": TableCompressionConfig(16, 16)}
    )


def test_a_single_layer_can_be_compared_with_itself_compressed(
    commands: "Commands", settings: Callable[..., Config]
) -> None:
    commands.arm |= {"training_bytes_peak": 8, "served_bytes": {"dcp": 9_000_000, "dcp-kept": 2_000_000}}
    result = compare(settings("model.hidden_dim=null", "compression.policy=static"), 1)
    assert list(result["arms"]) == ["single", "single_compressed"]
    trained_in = ("single_compressed", "single")
    assert commands.ran == [(command, arm) for arm in trained_in for command in COMMANDS]
    assert comparison_report(result).endswith("See also docs/compression.md.")
    assert "mlet compare configs/criteo_kaggle.yaml" not in comparison_report(result)
    assert "| 2.0 MB " in comparison_table(result)
    assert "9.0 MB" not in comparison_table(result)


COMMANDS = ("train", "export", "verify", "verify")  # valid and test
ARM = {"trained_table_bytes": 1, "served_bytes": {"dcp": 1}, "test_auc": 0.5, "test_logloss": 0.25}
ALL = [(command, arm) for arm in ("single", "mlet", "control") for command in COMMANDS]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands()
    monkeypatch.setattr(
        compare_module, "_run_command", lambda *words: commands(words[0], words[1].removesuffix("-export"), *words[2:])
    )
    return commands


@pytest.fixture
def settings(small_model: tuple[str, ...], tmp_path: Path) -> Callable[..., Config]:
    return lambda *more: load_config(CONFIG, [*small_model, f"run.dir={tmp_path / 'base'}", *more])


def test_a_comparison_that_was_stopped_resumes(commands: Commands, settings: Callable[..., Config]) -> None:
    commands.stop = ("train", "control")
    with pytest.raises(KeyboardInterrupt):
        compare(settings("run.overwrite=true"), 1)
    assert commands.ran == ALL[: 2 * len(COMMANDS)]
    commands.ran, commands.stop = [], None
    result = compare(settings(), 1)
    assert "compare them on other data" in comparison_report(result)
    assert commands.ran == [each for each in ALL if each not in (("train", "single"), ("train", "mlet"))]
    assert list(result["arms"]) == ["single", "mlet", "control"]
    commands.ran = []
    assert compare(settings("run.overwrite=true"), 1) == result
    assert commands.ran == ALL


def test_models_of_other_data_are_not_compared(
    commands: Commands, settings: Callable[..., Config], tmp_path: Path
) -> None:
    data, base = tmp_path / "data", tmp_path / "base"
    shutil.copytree(settings().data.path, data)
    of_data = f"data.path={data}"
    commands.stop = ("train", "control")
    with pytest.raises(KeyboardInterrupt):
        compare(settings(of_data), 1)
    commands.ran, commands.stop = [], None
    other = DatasetSchema.load(data)
    changed = dataclasses.replace(other, parts={**other.parts, "test": other.parts["valid"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetSchema, "load", lambda *_: changed)
        with pytest.raises(UserError, match=r"single: was trained on another data set, of which test differ; choose"):
            compare(settings(of_data), 1)
        assert commands.ran == []
        # Of an overwritten comparison that is stopped, some arms have the old data and some the new.
        commands.stop = ("train", "mlet")
        with pytest.raises(KeyboardInterrupt):
            compare(settings(of_data, "run.overwrite=true"), 1)
        commands.stop = None
        with pytest.raises(UserError, match=r"mlet: was trained on another data set"):
            compare(settings(of_data), 1)
    with pytest.raises(UserError, match=r"single: was trained on another data set"):
        compare(settings(of_data), 1)
    compare(settings(of_data, "run.overwrite=true"), 1)
    (base / "data.json").write_text("no")
    with pytest.raises(UserError, match=r"data\.json: cannot be read"):
        compare(settings(of_data), 1)


def test_results_of_models_that_are_being_replaced_are_removed(
    commands: Commands, settings: Callable[..., Config], tmp_path: Path
) -> None:
    compare(settings(), 1)
    assert (tmp_path / "base" / "comparison.json").exists()
    commands.stop = ("train", "mlet")
    with pytest.raises(KeyboardInterrupt):
        compare(settings("train.seed=1", "run.overwrite=true"), 1)
    assert not list((tmp_path / "base").glob("comparison.*"))


def test_a_model_whose_dense_arch_died_is_named(commands: Commands, settings: Callable[..., Config]) -> None:
    assert "returns the same for all rows" not in comparison_table(compare(settings(), 1))
    commands.arm["dense_arch_varies"] = False
    table = comparison_table(compare(settings("run.overwrite=true"), 1))
    assert "- The run of MLET failed: the dense arch returns the same for all rows" in table


@pytest.mark.parametrize(
    ("mlet_logits", "verdict"),
    [
        ([-1.0, 1.0, -1.0, 1.0], "LogLoss 0.0000 (0.0000 to 0.0000, may be chance)"),
        ([-2.0, 2.0, -2.0, 2.0], "LogLoss -0.1863 (-0.1863 to -0.1863, better)"),
        ([-0.5, 0.5, -0.5, 0.5], "LogLoss +0.1608 (+0.1608 to +0.1608, worse)"),
    ],
)
def test_a_difference_has_a_verdict(
    mlet_logits: list[float], verdict: str, commands: Commands, settings: Callable[..., Config]
) -> None:
    commands.logits["mlet"] = mlet_logits
    table = comparison_table(compare(settings(), 1))
    assert f"- MLET against single layer: {verdict}; AUC 0.0000 (0.0000 to 0.0000, may be chance)" in table
    assert "- MLET against the control: LogLoss" in table


def test_without_rows_of_both_labels_there_is_no_auc_to_compare() -> None:
    undefined = {"value": None, "low": None, "high": None}
    loss = {"value": -0.25, "low": -0.5, "high": 0.125}
    difference = {"arm": "mlet", "of": "single", "rows": 3, "auc": undefined, "logloss": loss}
    table = comparison_table({"split": "test", "arms": {}, "differences": [difference]})
    assert "LogLoss -0.2500 (-0.5000 to +0.1250, may be chance); AUC undefined" in table


@pytest.mark.parametrize("overwrite", ["false", "true"])
@pytest.mark.parametrize("folder", ["control", "control-export"])
def test_files_of_others_stop_it_before_anything_is_trained(
    folder: str, overwrite: str, commands: Commands, settings: Callable[..., Config], tmp_path: Path
) -> None:
    holiday = tmp_path / "base" / folder / "holiday.jpg"
    holiday.parent.mkdir(parents=True)
    holiday.touch()
    with pytest.raises(UserError, match=str(holiday.parent)):
        compare(settings(f"run.overwrite={overwrite}"), 1)
    assert holiday.exists()
    assert commands.ran == []


def test_an_arm_of_other_settings_stops_it_before_anything_is_trained(
    commands: Commands, settings: Callable[..., Config]
) -> None:
    compare(settings(), 1)
    commands.ran = []
    with pytest.raises(UserError, match=r"run\.overwrite=true"):
        compare(settings("train.seed=1"), 1)
    assert commands.ran == []


def test_a_full_disk_is_an_input_error(
    commands: Commands, settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compare_module, "save_config", full)
    with pytest.raises(UserError, match="No space left on device"):
        compare(settings(), 1)


def test_nothing_to_compare_without_a_hidden_dim(small_model: tuple[str, ...], tmp_path: Path) -> None:
    message = error_line("compare", CONFIG, *small_model, "model.hidden_dim=null", f"run.dir={tmp_path / 'run'}")
    assert "model.hidden_dim" in message
    assert not (tmp_path / "run").exists()


def test_an_undefined_auc_is_shown_as_such() -> None:
    arm = {
        "trained_table_bytes": 3_200_000_000,
        "served_bytes": {"dcp": 100_000, "int8": 44_736},
        "test_auc": None,
        "test_logloss": 0.25,
        "max_abs_logit_diff": 0.0,
    }
    row = comparison_table({"split": "test", "arms": {"mlet": arm}, "differences": []}).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "MLET",
        "3.2 GB",
        "44.7 kB",
        "undefined",
        "0.2500",
        "none, bitwise identical",
    ]
