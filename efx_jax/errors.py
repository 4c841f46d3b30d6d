"""How a user's mistake is told: one line on stderr and exit code 2."""

import argparse
from typing import NoReturn


class InputError(ValueError):
    """Bad input: a file, a flag, a row or a shape that the user can fix.

    The message is one line that names what is wrong, where, what was expected, what was found, and the fix.
    """


class MissingInputError(InputError):
    """What is asked for is not on this machine and cannot be fetched; nothing is wrong with it."""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line; argparse itself prints the usage too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")
