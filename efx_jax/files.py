"""Files that are whole or absent: written beside their place, synced to disk, then renamed."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from efx_jax.errors import InputError

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG)


@contextlib.contextmanager
def atomic_folder(dst: str | os.PathLike[str], replace: bool = False, needs: int = 0) -> Iterator[Path]:
    """Gives a temporary sibling folder to fill; on leaving it is synced and becomes `dst`, on an error it is removed.

    Args:
        dst: the folder to make; an empty folder may stand there.
        replace: whether a filled `dst` is replaced (only after the new one is complete).
        needs: bytes that must be free on that disk before any work begins.

    Raises:
        InputError: `dst` exists and `replace` is false, the disk is full, or the place is not writable.
    """
    dst = Path(dst)
    if not replace and _is_filled(dst):
        raise InputError(f"{dst}: exists already; expected a new path; choose another or remove it first")
    with _user_errors(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dst.parent).free
        if free < needs:
            raise InputError(f"{dst}: needs {needs:,} bytes, but the disk has {free:,} free; choose another disk")
        partial = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", suffix=".partial", dir=dst.parent))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            _sync_tree(partial)
            if replace and _is_filled(dst):
                _swap(partial, dst)
            else:
                os.rename(partial, dst)
            _sync(dst.parent)
        except BaseException:
            _remove(partial)
            raise


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a whole file (text as UTF-8), replacing what stood there in one step.

    Raises:
        InputError: the disk is full or the place is not writable.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with _user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
            _sync(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise InputError(
                f"{path}: the disk is full; nothing was written; free some space or choose another disk"
            ) from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            where = error.filename or path
            raise InputError(f"{where}: cannot be written ({error.strerror}); choose another path") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's quota on it, is full (also when a C++ library says it)."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)


def _is_filled(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _swap(partial: Path, dst: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", suffix=".old", dir=dst.parent)) / dst.name
    os.rename(dst, old)
    try:
        os.rename(partial, dst)
    except BaseException:
        os.rename(old, dst)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _remove(folder: Path) -> None:
    # A library's threads may still be writing into it for a moment.
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
