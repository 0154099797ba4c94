"""What ends a command with one line and no traceback."""


class UserError(Exception):
    """A mistake in a config, a file or an argument, which the user can mend; exit code 2.

    The message names the file, key, table or rank, the value found and what would be right, in one line: what raw data
    brings into it cannot break the line or steer the terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Interrupted(Exception):
    """A run that was told to stop has saved itself if it could, and goes on when it is started again; exit code 75."""

    EXIT_CODE = 75
    """sysexits.h: EX_TEMPFAIL, try again."""


class RanksLost(Exception):
    """Other ranks do not answer any more; exit code 1."""


class ConnectionLost(RanksLost):
    """Another rank has ended, and why is for that one to say; the exit code is that of ``Interrupted``.

    Nothing is wrong with a rank that lost another: a scheduler is to start it again, and not to count it.
    """

    EXIT_CODE = Interrupted.EXIT_CODE


def one_line(text: str) -> str:
    """The text with spaces for line ends, and other characters that are not printable escaped as in Python."""
    shown = " ".join(text.splitlines())
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def os_error(error: BaseException | None) -> OSError | None:
    """The first OSError in a chain of causes; torch's own errors say nothing of a full disk."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
