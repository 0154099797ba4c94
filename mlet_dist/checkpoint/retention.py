"""Which checkpoints stay."""

from mlet_dist.checkpoint.manifest import ManifestError
from mlet_dist.checkpoint.store import CheckpointStore


def drop_old(store: CheckpointStore, keep_last: int, keep_every: int | None) -> None:
    """Remove whole checkpoints but the last ``keep_last`` and those whose step is a multiple of ``keep_every``.

    Those that are not whole are left alone: one may be being written.
    """
    whole = []
    for checkpoint in store.checkpoints():
        try:
            checkpoint.manifest()
        except ManifestError:
            continue
        whole.append(checkpoint)
    for checkpoint in whole[:-keep_last]:
        if keep_every is None or checkpoint.step % keep_every:
            checkpoint.remove()
