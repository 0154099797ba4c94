"""What a checkpoint of a run holds, and how a run is restored or rolled back from it."""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist import __version__
from mlet_dist.checkpoint.load import (
    MODEL_KEY,
    OPTIMIZER_KEY,
    CompleteCheckpoint,
    check_shapes,
    latest_complete,
    latest_unverified,
    load_model,
    read_metadata,
    require_complete,
)
from mlet_dist.checkpoint.long_work import run_long
from mlet_dist.checkpoint.manifest import RUN_ID
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.checkpoint.tensor_ranges import INDEX
from mlet_dist.checkpoint.verified_load import load_verified
from mlet_dist.embeddings.row_order import ROW_ORDER, SPREAD, is_spread
from mlet_dist.errors import UserError
from mlet_dist.models.tables import table_prefixes
from mlet_dist.training.fused_optimizers import optimizer_state
from mlet_dist.training.job import Job
from mlet_dist.training.model_plan import ModelPlan
from mlet_dist.training.non_finite_guard import NonFinite
from mlet_dist.training.refitted_tables import RefittedTables
from mlet_dist.training.reporting import Recorder, TrainingReport
from mlet_dist.training.resume import warn_of_damage
from mlet_dist.training.state import Training
from mlet_dist.training.validation_state import VALIDATION, ValidationState

_METRICS_KEY, _RANDOM_KEY = "metrics", "rng"


def state_to_save(training: Training) -> dict[str, Any]:
    """Return all tensors of a run, not copied: ``model``, ``optimizer``, ``metrics``, ``rng``. A collective call."""
    state = {
        MODEL_KEY: training.model.state_dict(),
        OPTIMIZER_KEY: optimizer_state(training.optimizer),
        _METRICS_KEY: training.metrics.state_dict(),
        _RANDOM_KEY: _random_state(),
    }
    return {key: value for key, value in state.items() if value}  # SGD has no state


def manifest_fields(
    job: Job, plan: ModelPlan, recorder: Recorder, report: TrainingReport, training: Training
) -> dict[str, Any]:
    """Return what a checkpoint's manifest holds beside the list of files."""
    return {
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        RUN_ID: job.run.run_id,
        **rank_info(training),
        "skipped": training.skipped,
        "passed_over": sorted(training.excluded_steps),
        "data": job.loader.state_dict(training.step),
        "records": recorder.size,
        "report": report.state_dict(),
        VALIDATION: training.validation.to_dict(),
        "identity": job.identity,
        "spec": job.spec.to_dict(),
        "config": job.config.to_dict(),
        "plan": plan.entries(),
        ROW_ORDER: SPREAD,
    }


def versions() -> dict[str, str]:
    """Return the versions of the software that a run's exact results depend on."""
    return {
        "mlet_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchrec": version("torchrec"),
    }


def restore(
    training: Training, found: CompleteCheckpoint, tables: RefittedTables | None = None, *, continues: bool = True
) -> None:
    """Load a complete checkpoint into ``training``, in any sharding, on any number of ranks. A collective call.

    Args:
        training: what is restored.
        found: the checkpoint.
        tables: its tables, if rows have other widths now, or tables more rows. Rows that are stored by id there are
            converted without them.
        continues: whether training goes on where it was. Otherwise it begins with these weights and optimizer states.

    Random states are restored only on the same number of ranks and the same kind of device. Training depends on them
    only for half-precision rows on CUDA, which are rounded stochastically, and for layers such as dropout.

    Raises:
        UserError: a tensor is missing, has another shape, or cannot be read.
    """
    location = found.checkpoint.location
    tables = tables or RefittedTables.of_rows_by_id(found.checkpoint, found.manifest)
    state = state_to_save(training)
    prefixes = table_prefixes(training.model)
    if tables is not None:
        load_model(training.model, location, without=prefixes)
        del state[MODEL_KEY]
        states = state.get(OPTIMIZER_KEY, {})
        tables.load(training.model, states)
        if states:
            state[OPTIMIZER_KEY] = {name: of for name, of in states.items() if not name.startswith(prefixes)}
    about = found.manifest.about
    if not continues:
        del state[_METRICS_KEY], state[_RANDOM_KEY]
        _load_rest(training, state, found, tables)
        return
    same_ranks = about["world_size"] == dist.get_world_size() and about["device"] == _device(training)
    if not same_ranks:
        del state[_RANDOM_KEY]
    # Losses are summed by rank.
    state[_METRICS_KEY] = {
        name: tensor.new_zeros(about["world_size"]) if name.endswith("loss") else tensor
        for name, tensor in state[_METRICS_KEY].items()
    }
    _load_rest(training, state, found, tables)
    training.metrics.load_state_dict(state[_METRICS_KEY])
    if same_ranks:
        _set_random_state(state[_RANDOM_KEY])
    training.step, training.skipped = found.manifest.step, about["skipped"]
    training.excluded_steps = set(about["passed_over"])
    training.validation = ValidationState.from_dict(about.get(VALIDATION))


def _load_rest(
    training: Training, state: dict[str, Any], found: CompleteCheckpoint, tables: RefittedTables | None
) -> None:
    """Fill what ``state`` has left, and the model with it unless its ``tables`` were filled before."""
    if tables is None:
        run_long(lambda _: _check_shapes(state[MODEL_KEY], found))
    if state:
        load_verified(state, found.checkpoint, found.manifest)
    if tables is None:
        training.model.load_state_dict(state[MODEL_KEY])


def _check_shapes(state: dict[str, Any], found: CompleteCheckpoint) -> None:
    """Verify the index of a checkpoint, a pickle, before it is opened; compare the shapes of the model's tensors."""
    damage = found.manifest.find_damage(INDEX, found.checkpoint.open)
    if damage is not None:
        raise UserError(f"{found.checkpoint}: {damage}")
    location = found.checkpoint.location
    check_shapes(state, read_metadata(location), location, MODEL_KEY)


def restore_latest(training: Training, store: CheckpointStore, found: CompleteCheckpoint) -> CompleteCheckpoint:
    """Restore a checkpoint of the run that was not verified, or the latest complete one if it is damaged.

    A collective call. The files of the checkpoints are read for verification only if loading fails. A checkpoint whose
    rows are stored by id is verified first, because ``restore`` does not verify its dense layers, and only the ranks
    that own damaged rows would find them.

    Returns:
        The checkpoint that was restored. Its ``damage`` describes later ones that were passed over.

    Raises:
        UserError: it cannot be loaded, and no other one is complete.
    """
    try:
        if not is_spread(found.manifest.about):
            require_complete(found.checkpoint)
        restore(training, found)
    except UserError:
        complete = latest_complete(store)
        if complete is None or complete.manifest.step >= found.manifest.step:
            raise
        restore(training, complete)
        return complete
    return found


def rank_info(training: Training) -> dict[str, Any]:
    """Return the world size and the device type that a checkpoint is written on."""
    return {"world_size": dist.get_world_size(), "device": _device(training)}


def _device(training: Training) -> str:
    return next(training.model.parameters()).device.type


def seed_random_state(seed: int) -> None:
    """Begin the random states of this rank, from which layers such as dropout draw, with other values than any other's.

    ``restore`` replaces them by those of a checkpoint.
    """
    torch.manual_seed(seed * dist.get_world_size() + dist.get_rank())


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


def roll_back(training: Training, store: CheckpointStore, error: NonFinite, limit: int) -> Mapping[str, Any]:
    """Restore the latest complete checkpoint, and exclude the batch of ``error`` from now on. A collective call.

    The batches in between are trained again: the result is that of a run that never saw the excluded batch.

    Args:
        training: the state to roll back.
        store: the run's checkpoints; none was saved after the batch, because the guard is flushed before saving.
        error: what was found.
        limit: how often a run may be rolled back.

    Returns:
        The fields of the checkpoint's manifest.

    Raises:
        NonFinite: the run was rolled back ``limit`` times already, or there is no checkpoint.
        UserError: every checkpoint is damaged.
    """
    if len(training.excluded_steps) >= limit:
        raise NonFinite(
            error.finding, f"the run was rolled back {limit} times, and train.non_finite_limit allows no more"
        ) from None
    found = latest_unverified(store)
    if found is None:
        raise NonFinite(error.finding, f"{store} holds no checkpoint to roll back to") from None
    # The checkpoint does not hold steps that were excluded after it was saved.
    excluded_steps = training.excluded_steps | {error.finding.step}
    found = restore_latest(training, store, found)
    warn_of_damage(found)
    training.excluded_steps = excluded_steps
    return found.manifest.about
