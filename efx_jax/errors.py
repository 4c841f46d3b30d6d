"""The one exception that a user's mistake raises: the scripts print it as one line and exit with code 2."""


class InputError(ValueError):
    """Bad input: a file, a flag, a row or a shape that the user can fix.

    The message is one line that names what is wrong, where, what was expected, what was found, and the fix.
    """
