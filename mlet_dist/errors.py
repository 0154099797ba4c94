"""The one exception that means "the user can mend this": printed as one line, exit code 2, no traceback."""


class UserError(Exception):
    """A mistake in a config, a file or an argument.

    The message names the file, key, table or rank, the value found and what would be right, in one line.
    """
