"""What makes two runs the same one: the settings without which their weights would mean something else."""

from collections.abc import Mapping
from typing import Any

from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.models.spec import ModelSpec


def identity_of(config: Config, spec: ModelSpec, content_id: str) -> dict[str, Any]:
    """Setting -> plain value, of all settings that decide which weights a run ends with.

    What is not among them may change between two jobs of a run: ranks, devices, sharding, exchanges and their
    precision, cadences, places. The number of steps is among them where learning rates fall towards the last one.

    Args:
        content_id: of the training split, ``DatasetSchema.content_id``.
    """
    plain = config.to_dict()
    found = {f"model.{key}": value for key, value in plain["model"].items()}
    found |= {f"optimizer.{key}": value for key, value in plain["optimizer"].items()}
    found |= {
        "train.seed": config.train.seed,
        "train.initial_weights": config.train.initial_weights,
        "data.batch_size": config.data.batch_size,
        "data.shuffle": config.data.shuffle,
        "data.dense_features": list(spec.dense),
        "data.sparse_features": [feature.name for feature in spec.sparse],
        "the data set's vocabulary_id": spec.vocabulary_id,
        "the training split's files, by fingerprint,": content_id,
    }
    if config.data.shuffle:
        found["data.shuffle_buffer"] = config.data.shuffle_buffer
    if config.optimizer.decay != "constant":
        found |= {"train.epochs": config.train.epochs, "train.max_steps": config.train.max_steps}
    dtypes = config.sharding.rows_dtypes([feature.name for feature in spec.sparse])
    found |= {f"rows of table {feature.name}": feature.num_embeddings for feature in spec.sparse}
    return found | {f"rows_dtype of table {name}": dtype for name, dtype in dtypes.items()}


def check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: str, way_out: str) -> None:
    """Raise UserError, which names the settings, unless both are the same run's.

    Args:
        saved, wanted: of ``identity_of``.
        way_out: what the user may do instead of changing the settings back.
    """
    differing = []
    for key in sorted(saved.keys() | wanted.keys()):
        before, now = saved.get(key), wanted.get(key)
        if before != now:
            differing.append(f"{key} was {to_json(before)}, is {to_json(now)}")
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise UserError(f"{checkpoint} was saved with other settings: {shown}; set them back, or {way_out}")


def without_rates(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity less learning rates, their schedule and where a run began, all of which may be others if asked."""
    free = ("train.epochs", "train.max_steps", "train.initial_weights")
    return {
        key: value
        for key, value in identity.items()
        if key not in free and (key == "optimizer.name" or not key.startswith("optimizer."))
    }
