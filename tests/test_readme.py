"""The example and the commands of the README run, its links lead somewhere, and it stays short."""

import re

import pytest
import torch
from torch import distributed as dist
from torchrec import KeyedJaggedTensor

from mlet_dist.cli import main
from tests.helpers.forked_command import ROOT, TORCHRUN
from tests.helpers.mlet_command import run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_ones_own_model_trains() -> None:
    block = re.search(r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(block[1], names)
        model = names["model"]
        assert isinstance(model, torch.nn.Module)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        ids = torch.tensor([5, 5, 99_999])
        features = KeyedJaggedTensor(["ad_id"], ids, lengths=torch.ones(3, dtype=torch.int64))
        logits = model(torch.rand(3, 13), features)
        logits.sum().backward()
        changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
        assert changed == ["sparse_arch.embedding_bag_collection.embedding_bags.ads.weight"]
        projection = model.get_parameter("module.sparse_arch.embedding_bag_collection.projections.ads.weight")
        assert projection.grad is not None
        assert float(projection.grad.abs().sum()) > 0
    finally:
        dist.destroy_process_group()


@pytest.mark.multirank
def test_the_script_with_a_model_and_trainer_of_ones_own_trains_and_serves() -> None:
    script = ROOT / "docs" / "own_model.py"
    ran = run_command([*TORCHRUN, "--standalone", "--nproc-per-node", 2, script])
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", ran.stdout)]
    assert len(losses) == 3
    assert losses[-1] < 0.5 < losses[0] < 0.7
    assert re.search(r"largest difference .*: \d\.\de[-+]\d+", ran.stdout)
    used = re.findall(r"^from mlet_dist\S* import|^import mlet_dist\S*", script.read_text(), re.MULTILINE)
    assert used == ["from mlet_dist.embeddings import"]


def test_links_and_paths_exist() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:mlet_dist|configs|tests|docs)/[^`*<>]+)`", README):
        assert (ROOT / path).exists(), path


def test_commands_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    pages = README + "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    commands = sorted(set(re.findall(r"^ *mlet ([a-z]+)", pages, re.MULTILINE)))
    assert {"prepare", "train", "export", "verify", "evaluate", "compare"} <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert command in capsys.readouterr().out


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 8192
