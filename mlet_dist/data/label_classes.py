"""Splits whose rows all have the same label: an error for training, and a warning where AUC is undefined."""

from collections.abc import Iterable

from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError

_ADVICE = "look at the label column, at positive_from or positive in the table's description, and at the split rule"


def check_classes(path: object, schema: DatasetSchema, splits: Iterable[str]) -> list[str]:
    """Check that each of the splits has rows of both labels; a split without rows is not checked.

    Args:
        path: the data set's location, or that of its raw files, for messages.
        schema: the data set's schema.
        splits: the splits to check.

    Returns:
        A warning for ``valid`` and ``test`` if all their rows have the same label.

    Raises:
        UserError: all rows of ``train`` have the same label, from which nothing can be learned.
    """
    warnings = []
    counts = schema.label_counts
    for split in splits:
        for label, (positives, known) in counts.get(split, {}).items():
            if not schema.rows[split] or 0 < positives < known:
                continue
            found = f"{path}: all {known:,} rows of {split} have label {int(positives > 0)}"
            if schema.more_labels:
                found = f"{path}: all {known:,} rows of {split} that have the label {label} have {int(positives > 0)}"
            if split == "train":
                raise UserError(f"{found}, so a model can learn nothing from them; {_ADVICE}")
            warnings.append(f"{found}, so its AUC is undefined; {_ADVICE}")
    return warnings
