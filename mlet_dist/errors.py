"""Errors that end a command with one line instead of a traceback, each with its exit code; and warnings."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# What the machine refuses, whichever line of code asks for it: disk, quota, inodes, memory, files, permissions, links.
_REFUSALS = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ENOMEM", "EMFILE", "ENFILE", "EACCES", "EPERM", "ELOOP",
        "ENAMETOOLONG", "ESTALE", "ENODEV", "ENXIO",
    )
    if hasattr(errno, name)
}  # fmt: skip
_TORCH_MEMORY = re.compile(r"you tried to allocate (\d+) bytes|CUDA out of memory[^\n]*")


class UserError(Exception):
    """An input error: a config, a file or an argument is wrong, and the user can correct it. The exit code is 2.

    The message is one line. It names the file, key, table or rank, the value found, and what to do. Line ends and
    control characters that come from raw data are replaced, so that they cannot change the terminal's state.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn an OSError within the block into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


class Interrupted(Exception):
    """A signal stopped a run, which saved a checkpoint if it could, and resumes when started again. Exit code 75."""

    EXIT_CODE = 75
    """EX_TEMPFAIL of sysexits.h: try again."""


class RanksLost(Exception):
    """Other ranks do not respond any more. The exit code is 1."""

    EXIT_CODE = 1


class ConnectionLost(RanksLost):
    """Another rank has ended, or another node is lost. The exit code is that of ``Interrupted``.

    The rank that ended reports the cause. Nothing is wrong with this rank: a scheduler should start it again, and
    should not count it as a failure.
    """

    EXIT_CODE = Interrupted.EXIT_CODE


class NodesMissing(RanksLost):
    """Not all nodes of a job joined in time. Exit code 69.

    Nothing is wrong with the command: a scheduler should start it again when there is room for all nodes, and should
    not count it as a failure.
    """

    EXIT_CODE = 69
    """EX_UNAVAILABLE of sysexits.h: a service is not available."""


def one_line(text: str) -> str:
    """Return the text with spaces for line ends, and other unprintable characters escaped as in Python."""
    shown = " ".join(text.splitlines())
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def print_error(error: Exception | str) -> None:
    """Print an error in one line on stderr."""
    print("mlet: error:", one_line(str(error)), file=sys.stderr, flush=True)


def print_warning(text: str) -> None:
    """Print a warning in one line on stderr; a stderr that cannot be written is no reason to stop."""
    with suppress(OSError):
        print("mlet: warning:", one_line(text), file=sys.stderr, flush=True)


def refusal(error: BaseException) -> UserError | None:
    """Return the error to show in place of a traceback if the machine refused something, such as space on a disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _REFUSALS:
            return UserError(f"{cause.filename}: {cause.strerror}" if cause.filename else f"{cause.strerror}")
        found = _TORCH_MEMORY.search(str(cause)) if isinstance(cause, RuntimeError) else None
        if isinstance(cause, MemoryError) or found is not None:
            return UserError(
                f"memory ran out{'' if found is None else f': {found[0]}'}; use smaller batches, layers or tables, or "
                "more memory"
            )
        cause = cause.__cause__
    return None


def os_error(error: BaseException | None) -> OSError | None:
    """Return the first OSError in a chain of causes; the errors of torch do not mention, say, a full disk."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
