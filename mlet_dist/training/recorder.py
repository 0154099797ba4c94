"""What a run says of itself while it goes on: metrics.jsonl, TensorBoard."""

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.training.run_directory import RunDirectory


class Recorder:
    """Writes records of one run, on the first rank; on the others it does nothing.

    Args:
        enabled: whether this is the first rank.
        step, size: where the run is taken up, as ``go_back``.
    """

    def __init__(self, run: RunDirectory, enabled: bool, step: int = 0, size: int = 0) -> None:
        self._run, self._enabled = run, enabled
        self._open(step, size)

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl; a checkpoint keeps it, so that a run that goes on from there has each step once."""
        return self._lines.tell() if self._enabled else 0

    def record(self, split: str, step: int, values: Mapping[str, float | str | Sequence[float]]) -> None:
        """Write one line, and to TensorBoard a point a number and a histogram a list, under ``split/name``.

        Raises:
            UserError: they cannot be written.
        """
        if not self._enabled:
            return
        line = (to_json({"step": step, "split": split, **values}) + "\n").encode()
        with self._writing():
            if self._lines.write(line) < len(line):
                raise OSError(errno.ENOSPC, "the disk is full")
            for name, value in values.items():
                if isinstance(value, float | int):
                    self._tensorboard.add_scalar(f"{split}/{name}", value, step)
                elif not isinstance(value, str):
                    self._tensorboard.add_histogram(f"{split}/{name}", np.array(value), step)

    def go_back(self, step: int, size: int) -> None:
        """Drop what was recorded since there were ``size`` bytes, after ``step``; the steps that follow come again."""
        self._close()
        self._open(step, size)

    def _open(self, step: int, size: int) -> None:
        if not self._enabled:
            return
        with self._writing():
            metrics = self._run.metrics
            kept = metrics.read_bytes()[:size] if metrics.exists() else b""
            self._lines = metrics.open("ab", buffering=0)
            self._lines.truncate(kept.rfind(b"\n") + 1)  # a machine that went down may have lost the end
            self._lines.seek(0, 2)
            # TensorBoard drops what older files say of these steps.
            self._tensorboard = SummaryWriter(str(self._run.tensorboard), purge_step=step + 1)

    def _close(self) -> None:
        if self._enabled:
            with self._writing():
                self._lines.close()
                self._tensorboard.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"run.dir {self._run.path}: no record can be written: {error.strerror or error}"
            raise UserError(said) from None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._close()
        except UserError:
            if error is None:  # which else says more
                raise
