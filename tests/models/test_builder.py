"""Models of the user's own: their faults, found before training, in one line each."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import DataType

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.serving.quantised import table_tensors
from mlet_dist.export.serving.served_model import build_of_layout, layout_of
from mlet_dist.models.build import build_quantised_model, build_serving_model, build_training_model, with_tables_prefix
from mlet_dist.models.builder import import_builder
from mlet_dist.models.network_check import check_network
from mlet_dist.models.network_cost import dense_cost
from mlet_dist.models.spec import ModelSpec
from mlet_dist.models.tables import table_prefixes

META, CPU = torch.device("meta"), torch.device("cpu")
OWN = "tests.helpers.own_networks"
COLUMNS = ("I1", "I2")


def spec_of(builder: str, **arguments: object) -> ModelSpec:
    model = ModelConfig(builder=builder, arguments=arguments, embedding_dim=4, hidden_dim=8)
    return ModelSpec(model, COLUMNS, (SparseFeature("C1", 10), SparseFeature("C2", 20)), seed=0)


def message_of(spec: ModelSpec) -> str:
    with pytest.raises(UserError) as caught:
        check_network(build_training_model(spec, META), len(COLUMNS))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_tables_may_have_any_name_in_the_module() -> None:
    spec = with_tables_prefix(spec_of(f"{OWN}:wide_and_deep", hidden=5))
    assert spec.tables_prefix == "ebc."
    assert ModelSpec.from_dict(spec.to_dict(), "spec.json") == spec
    check_network(build_training_model(spec, META), len(COLUMNS))
    assert "ebc.projections.C2.weight" in build_training_model(spec, META).state_dict()
    served = [build_serving_model(spec), build_quantised_model(spec, DataType.INT8, CPU)]
    for model in served:
        assert "ebc.embedding_bags.C2.weight" in model.state_dict()
    layout = replace(layout_of(spec), form="mixed")
    mixed = build_of_layout(spec, layout, ENCODINGS["int8"])
    assert table_prefixes(mixed) == ("ebc.",)
    assert {"ebc.embedding_bags.C1.weight", "ebc.embedding_bags.C2.weight"} <= set(table_tensors(mixed))
    dense = {name: each for name, each in served[0].state_dict().items() if not name.startswith("ebc.")}
    assert all(torch.equal(served[1].state_dict()[name], each) for name, each in dense.items())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", f"model.builder: {OWN}:broken failed: KeyError: 'hiden' (own_networks.py, line LINE)"),
        (
            "exits",
            f"model.builder: {OWN}:broken failed: SystemExit: two towers need a query feature (own_networks.py, line "
            "LINE)",
        ),
        (
            "no module",
            f"model.builder: {OWN}:broken returned str; it must return a torch.nn.Module",
        ),
        (
            "without tables",
            f"model.builder: what {OWN}:broken returned does not hold embedding_bag_collection; return a module that "
            "has it as an attribute",
        ),
        (
            "the tables",
            f"model.builder: what {OWN}:broken returned is embedding_bag_collection; return a module that has it as an "
            "attribute",
        ),
        (
            "held twice",
            f"model.builder: what {OWN}:broken returned holds embedding_bag_collection twice, as ebc and again; assign "
            "it to one attribute",
        ),
        (
            "other tables",
            f"model.builder: what {OWN}:broken returned holds another collection of tables, other, before "
            "embedding_bag_collection, ebc; assign embedding_bag_collection first",
        ),
        (
            "called twice",
            "model.builder: forward calls embedding_bag_collection 2 times; a sharded collection exchanges the vectors "
            "of a batch once",
        ),
        (
            "loses a feature",
            "model.builder: the logits do not depend on feature 'C2'; use it, or leave it out of data.sparse_features",
        ),
        (
            "two logits",
            "model.builder: the module returned (64, 2) of torch.float32; it must return logits (64,) or (64, 1) of "
            "floating point numbers for 64 rows",
        ),
        (
            "no tensor",
            "model.builder: the module returned dict; it must return logits (64,) or (64, 1) of floating point numbers "
            "for 64 rows",
        ),
        (
            "lazy",
            f"model.builder: deep.0.weight of what {OWN}:broken returned has no size before the first forward; give "
            "layers their sizes instead of nn.Lazy modules: they are len(inputs.dense_features) and "
            "inputs.embedding_dims",
        ),
        (
            "creates parameters",
            "model.builder: forward creates the parameter 'scale'; create it in the builder, with its size",
        ),
        (
            "running statistics",
            "model.builder: forward changes the buffer 'norm.running_mean' in training; every rank would have its own, "
            "of its rows and of padding; use a layer without running statistics, as nn.LayerNorm for nn.BatchNorm1d",
        ),
        (
            "mixes rows",
            "model.builder: the logit of a row depends on other rows of the batch; batches are split among ranks and "
            "padded, so compute each row by itself",
        ),
    ],
)
def test_a_fault_is_named_in_one_line(fault: str, message: str) -> None:
    assert re.sub(r"line \d+", "line LINE", message_of(spec_of(f"{OWN}:broken", fault=fault))) == message


def test_an_error_of_forward_is_named() -> None:
    found = message_of(spec_of(f"{OWN}:broken", fault="wrong size"))
    assert found.startswith("model.builder: forward of the module failed: RuntimeError: ")
    assert "size" in found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.at_all:build", "no_such_package.at_all cannot be imported: ModuleNotFoundError: No module"),
        (f"{OWN}:biuld", f"{OWN} has no function 'biuld'"),
        (f"{OWN}:NOT_A_FUNCTION", f"{OWN} has a int, which is no function, named 'NOT_A_FUNCTION'"),
    ],
)
def test_what_cannot_be_imported_is_named(path: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        import_builder(path)
    assert str(caught.value).startswith(f"model.builder: {message}")


def test_modules_of_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found_in_the_working_directory.py").write_text("def build(inputs):\n    return inputs\n")
    monkeypatch.chdir(tmp_path)
    assert import_builder("found_in_the_working_directory:build")("x") == "x"  # type: ignore[arg-type]


def test_a_network_that_depends_on_values_is_estimated_and_says_so() -> None:
    spec = spec_of(f"{OWN}:broken", fault="depends on values")
    check_network(build_training_model(spec, META), len(COLUMNS))  # it runs with values
    cost = dense_cost(build_training_model(spec, META, dense_device=META), len(COLUMNS), 8, "sgd", 1, 1)
    assert cost.note is not None
    assert cost.note.startswith("the network cannot run on meta tensors (")
    assert cost.row_flops > 0


def test_a_network_with_buffers_is_measured() -> None:
    cost = dense_cost(
        build_training_model(spec_of(f"{OWN}:frozen"), META, dense_device=META), len(COLUMNS), 8, "sgd", 1, 1
    )
    assert cost.note is None


def test_checking_leaves_the_model_as_it_is() -> None:
    spec = spec_of(f"{OWN}:wide_and_deep", hidden=5)
    model, untouched = (build_training_model(spec, CPU) for _ in range(2))
    check_network(model, len(COLUMNS))
    assert all(torch.equal(each, untouched.state_dict()[name]) for name, each in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
