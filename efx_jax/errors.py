"""How a command reports and exits: a warning is one line on stderr, and so is a user error, with exit code 2."""

import argparse
import contextlib
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it, so that `train.py && ...` stops."""
BROKEN_PIPE = 141
"""Exit code when nobody reads the output any longer, as shells report it."""
_UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)


class InputError(ValueError):
    """Bad input: a file, a flag, a row or a shape that the user can fix.

    The message is one line that names what is wrong, where, what was expected, what was found, and the fix.
    """


class MissingInputError(InputError):
    """The requested input is valid, but not on this machine and cannot be fetched."""


class FallbackWarning(UserWarning):
    """Something other than what was requested is used, because that is missing."""


class OneLineParser(argparse.ArgumentParser):
    """Reports what is wrong with the arguments in one line; argparse itself also prints the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def whole_number(text: str, least: int = 0) -> int:
    """The type of an argument of `OneLineParser` that is an integer of at least `least`."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, found {text!r}")
    return value


def positive_number(text: str) -> int:
    """As `whole_number`, with a least value of 1."""
    return whole_number(text, 1)


def byte_size(text: str) -> int:
    """The type of an argument that is a number of bytes: 500MB and 2GB (powers of 1000), 2GiB (of 1024), or digits."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B|B?)", text.strip().upper())
    size = 0.0
    if match is not None:
        power = "KMGT".index(match[2]) + 1 if match[2] else 0
        size = float(match[1]) * (1024 if match[3] else 1000) ** power
    if not 1 <= size < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, found {text!r}")
    return int(size)


def exit_code(work: Callable[[], int], speaker: str, farewell: str = "") -> int:
    """Runs a command; errors that the user can fix before running it again, and warnings, are one line on stderr each.

    Args:
        work: the command; returns its exit code.
        speaker: the first word of that line, before a colon.
        farewell: the line after Ctrl-C, or "".

    Returns:
        What `work` returns; 2 for bad input, a path that cannot be reached, or a full disk or device; 130 after Ctrl-C;
        141 if the output is closed.
    """
    try:
        with _short_warnings():
            code = work()
            sys.stdout.flush()
            return code
    except InputError as error:
        complaint = " ".join(str(error).split())
    except BrokenPipeError:
        # The reader has stopped (`... | head`); nothing must be left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (OSError, ValueError) as error:  # TensorStore, which writes checkpoints, raises a ValueError
        where = getattr(error, "filename", None) or "the output"
        if is_disk_full(error):
            complaint = f"{where}: the disk is full; make room, then run it again"
        elif isinstance(error, OSError) and error.filename is not None and error.errno in _UNREACHABLE:
            complaint = f"{str(where)[:200]}: {error.strerror}; check the path and its permissions"
        else:
            raise
    except RuntimeError as error:  # jax's own kind of it; whoever mistypes a flag should not wait for jax
        if not is_out_of_memory(error):
            raise
        complaint = (
            f"out of memory on the device ({first_line(error)}); take smaller parts (train.micro_batch, "
            "train.micro_tokens, eval.batch_size, --batch-size), train.remat block, or spread the model by mesh.fsdp; "
            "train.py --dry-run says what a run needs, and a run goes on with these settings changed"
        )
    except KeyboardInterrupt:
        if farewell:
            print(farewell, file=sys.stderr)
        return INTERRUPTED
    print(f"{speaker}: {complaint}", file=sys.stderr)
    return 2


def first_line(error: BaseException) -> str:
    """The first line of an error from third-party code, for a one-line message; its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an XLA error says that a device, or the host acting as one, has no memory left."""
    return isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's quota on it, is full (also if it comes from a C++ library)."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """A context in which this package's warnings are printed as one line each, without their place in the source."""
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
