"""What a checkpoint holds of a run, and how a run takes it up."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist import __version__
from mlet_dist.checkpoint.choosing import Found
from mlet_dist.checkpoint.load import MODEL_KEY, OPTIMIZER_KEY, load_model, load_state
from mlet_dist.training.optimizers import optimizer_state
from mlet_dist.training.state import Training

_METRICS_KEY, _RANDOM_KEY = "metrics", "rng"


def tensors_of(training: Training) -> dict[str, Any]:
    """All tensors of a run, by name, as they are: ``model``, ``optimizer``, ``metrics``, ``rng``. A collective call."""
    state = {
        MODEL_KEY: training.model.state_dict(),
        OPTIMIZER_KEY: optimizer_state(training.optimizer),
        _METRICS_KEY: training.metrics.state_dict(),
        _RANDOM_KEY: _random_state(),
    }
    return {key: value for key, value in state.items() if value}  # SGD has no state


def versions() -> dict[str, str]:
    """Of what the bits of a run depend on."""
    return {
        "mlet_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchrec": version("torchrec"),
    }


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def restore(training: Training, found: Found) -> None:
    """Fill ``training`` from a whole checkpoint, in any sharding, on any number of ranks. A collective call.

    Random numbers go on only on as many ranks of the same kind: nothing that is trained depends on them but rows in
    half precision on CUDA, which are rounded stochastically.

    Raises:
        UserError: a tensor is missing, of another shape, or cannot be read.
    """
    location = found.checkpoint.location
    load_model(training.model, location)
    state = tensors_of(training)
    del state[MODEL_KEY]
    about = found.manifest.about
    alike = about["world_size"] == dist.get_world_size() and about["device"] == _device(training)
    if not alike:
        del state[_RANDOM_KEY]
    state[_METRICS_KEY]["loss"] = state[_METRICS_KEY]["loss"].new_zeros(about["world_size"])
    load_state(state, location)
    training.metrics.load_state_dict(state[_METRICS_KEY])
    if alike:
        _set_random_state(state[_RANDOM_KEY])
    training.step, training.skipped = found.manifest.step, about["skipped"]
    training.passed_over = set(about["passed_over"])


def about_ranks(training: Training) -> dict[str, Any]:
    """How many ranks write a checkpoint, and on what."""
    return {"world_size": dist.get_world_size(), "device": _device(training)}


def _device(training: Training) -> str:
    return next(training.model.parameters()).device.type


def _random_state() -> dict[str, torch.Tensor]:
    rank = dist.get_rank()
    state = {f"cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    rank = dist.get_rank()
    torch.set_rng_state(state[f"cpu.{rank}"])
    if f"cuda.{rank}" in state:
        torch.cuda.set_rng_state(state[f"cuda.{rank}"])
