"""Checks of the settings of validation while training: against one another, and against the splits of the data set."""

from collections.abc import Mapping

from mlet_dist.config.sections import TrainConfig
from mlet_dist.errors import UserError

VALIDATED = "valid"
"""The split that validations measure."""

_NEEDS = (("patience", "keep_best", "logloss"), ("keep_best", "validate_every", "1000 or to epoch"))


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


def check_validation_split(
    train: TrainConfig, data: object, rows: Mapping[str, int], positives: Mapping[str, int]
) -> None:
    """Check that the data set has what validations measure.

    Args:
        train: the section.
        data: the data set's location, for messages.
        rows, positives: by split of the data set, its rows and those with label 1.

    Raises:
        UserError: it has no split ``valid``, or ``train.keep_best`` is ``auc`` and all rows of it have the same label.
    """
    if train.validate_every is None:
        return
    count = rows.get(VALIDATED, 0)
    if not count:
        raise UserError(
            f"train.validate_every is {train.validate_every}, and {data} has no rows of a split valid; prepare the "
            "data set with one, or set train.validate_every=null"
        )
    if train.keep_best == "auc" and positives.get(VALIDATED, 0) in (0, count):
        raise UserError(
            f"train.keep_best is auc, and all rows of valid in {data} have the same label, which leaves their AUC "
            "undefined; set train.keep_best=logloss"
        )
