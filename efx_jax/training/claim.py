"""A run's folder belongs to one process (or one group of hosts) at a time."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from efx_jax.errors import InputError
from efx_jax.files import leftovers, lock


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Creates a folder and keeps other processes out of it until the context exits or the process dies.

    Temporary files and folders of a killed process are removed. On disks without locks every process is let in, and
    nothing is removed.

    Raises:
        InputError: another process is at work there, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    except OSError as error:
        where = error.filename or output
        raise InputError(f"{where}: cannot be written ({error.strerror}); choose another --output") from error
    try:
        busy = f"{output}: another process is at work on this run; wait for it, or choose another --output"
        if lock(descriptor, busy):
            for partial in leftovers(output):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        yield
    finally:
        os.close(descriptor)
