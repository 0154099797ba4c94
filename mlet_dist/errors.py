"""What ends a command with one line and no traceback."""


class UserError(Exception):
    """A mistake in a config, a file or an argument, which the user can mend; exit code 2.

    The message names the file, key, table or rank, the value found and what would be right, in one line.
    """


class Interrupted(Exception):
    """A run that was told to stop has saved itself, and goes on when it is started again; exit code 75."""

    EXIT_CODE = 75
    """sysexits.h: EX_TEMPFAIL, try again."""


class RanksLost(Exception):
    """Other ranks do not answer any more; exit code 1."""


class PeerLost(RanksLost):
    """The connection to another rank broke, whose own node says why; the exit code is that of ``Interrupted``.

    Nothing is wrong with a rank that lost another: a scheduler is to start it again, and not to count it.
    """

    EXIT_CODE = Interrupted.EXIT_CODE
