"""How a user's mistake is told: one line on stderr and exit code 2."""

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
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


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """Within it a warning of this package is printed as one line, without its place in the source."""
    standard = warnings.formatwarning

    def written(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        own = "efx_jax" in Path(filename).parts
        return f"warning: {message}\n" if own else standard(message, category, filename, lineno, line)

    warnings.formatwarning = written
    try:
        yield
    finally:
        warnings.formatwarning = standard
