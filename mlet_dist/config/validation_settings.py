"""Checks of the settings of validation while training: against one another, and against the splits of the data set."""

from collections.abc import Mapping, Sequence

from mlet_dist.config.parser import did_you_mean
from mlet_dist.config.sections import TrainConfig
from mlet_dist.errors import UserError

VALIDATED = "valid"
"""The split that validations measure."""

_NEEDS = (("patience", "keep_best", "logloss"), ("keep_best", "validate_every", "1000 or to epoch"))


_METRICS = ("auc", "logloss")


def metrics_to_choose_by(labels: Sequence[str]) -> dict[str, str]:
    """Return the values of ``train.keep_best`` for a data set with these labels, and the metric that each names."""
    if len(labels) == 1:
        return {metric: metric for metric in _METRICS}
    named = {f"{label}_{metric}": f"{label}_{metric}" for label in labels for metric in _METRICS}
    return {metric: f"{labels[0]}_{metric}" for metric in _METRICS} | named


def check_validation_settings(train: TrainConfig, source: str, sources: Mapping[str, str]) -> None:
    """Check that no setting of validation lacks one that it needs.

    Args:
        train: the section.
        source: the file that messages name.
        sources: for keys that were given elsewhere, what messages name instead of ``source``.

    Raises:
        UserError: one does.
    """
    for name, needed, example in _NEEDS:
        value = getattr(train, name)
        if value is not None and getattr(train, needed) is None:
            key = f"train.{name}"
            raise UserError(
                f"{sources.get(key, source)}: {key} is {value}, which needs train.{needed}, and that is null; set it, "
                f"for example to {example}"
            )
    best = train.keep_best
    if best is not None and not any(best == metric or best.endswith(f"_{metric}") for metric in _METRICS):
        raise UserError(
            f"{sources.get('train.keep_best', source)}: train.keep_best: expected auc, logloss, one of these of a "
            f"label, as click_auc, or null, found {best}{did_you_mean(best, _METRICS)}"
        )


def check_validation_split(
    train: TrainConfig,
    data: object,
    rows: Mapping[str, int],
    label_counts: Mapping[str, Mapping[str, tuple[int, int]]],
) -> None:
    """Check that the data set has what validations measure.

    Args:
        train: the section.
        data: the data set's location, for messages.
        rows: by split of the data set.
        label_counts: by split and label, the rows with label 1, and those that have the label.

    Raises:
        UserError: it has no split ``valid``, or ``train.keep_best`` is an AUC, and all rows of it have the same label.
    """
    if train.validate_every is None:
        return
    count = rows.get(VALIDATED, 0)
    if not count:
        raise UserError(
            f"train.validate_every is {train.validate_every}, and {data} has no rows of a split valid; prepare the "
            "data set with one, or set train.validate_every=null"
        )
    counts, best = label_counts[VALIDATED], train.keep_best
    chosen = metrics_to_choose_by(tuple(counts)).get(best or "", "")
    label = next(iter(counts)) if len(counts) == 1 else chosen.removesuffix("_auc")
    if chosen.endswith("auc") and counts[label][0] in (0, counts[label][1]):
        raise UserError(
            f"train.keep_best is {best}, and all rows of valid in {data} have the same label, which leaves their AUC "
            f"undefined; set train.keep_best={(best or '').removesuffix('auc')}logloss"
        )
