"""Files that are complete or absent: written beside their destination, synced to disk, then renamed."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from efx_jax.errors import InputError, is_disk_full
from efx_jax.parallel.hosts import meet, together

_UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
)


def lock(descriptor: int, busy: str) -> bool:
    """Locks an open file or folder for this process and those that inherit it; False if the disk supports no locks.

    Args:
        descriptor: of the file or folder.
        busy: the error message if another process holds the lock.

    Raises:
        InputError: `busy`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(busy) from error
    except OSError:
        return False
    return True


@contextlib.contextmanager
def atomic_folder(dst: str | os.PathLike[str], needs: int = 0, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder to fill; on exit it is synced and becomes `dst`, on an error it is removed.

    Args:
        dst: the folder to make; an empty folder may exist there.
        needs: bytes that must be free on that disk before any work begins.
        shared: whether all processes of the run fill this one folder, on a disk that they share. All of them enter the
            context, the first makes and renames the folder, and the body may call `meet`.

    Raises:
        InputError: `dst` exists, the disk is full, the place is not writable, the body cannot read a file, or a process
            does not see the folder that the first has made.
        OtherProcessError: the body has failed in another process.
    """
    dst = Path(dst)
    leads = not shared or jax.process_index() == 0
    partial: Path | None = None
    with _user_errors(dst):
        try:
            with together() if shared else contextlib.nullcontext():
                number = _make_partial(dst, needs) if leads else 0
                partial = _partial(dst, meet(number)[0] if shared else number)
                if not partial.is_dir():
                    raise InputError(
                        f"{dst}: process {jax.process_index()} does not see the folder that process 0 has made there; "
                        "choose a path on a disk that all hosts share"
                    )
                yield partial
                if shared:
                    meet()
                if leads:
                    _sync_tree(partial)
                    os.rename(partial, dst)
                    _sync(dst.parent)
        except BaseException:
            if leads and partial is not None:
                _remove(partial)
            raise


@contextlib.contextmanager
def atomic_file(dst: str | os.PathLike[str], needs: int = 0) -> Iterator[Path]:
    """Yields a temporary sibling to write; on exit it is synced and becomes the file `dst`, on an error it is removed.

    Args:
        dst: the file to make.
        needs: bytes that must be free on that disk before any work begins.

    Raises:
        InputError: `dst` exists, the disk is full, or the place is not writable.
    """
    dst = Path(dst)
    with _user_errors(dst):
        if dst.is_dir():
            raise InputError(f"{dst}: is a folder; expected the path of a new file; choose another")
        _check_place(dst, needs)
        partial = _partial(dst, secrets.randbelow(2**31))
        try:
            yield partial
            _sync(partial)
            os.rename(partial, dst)
            _sync(dst.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a whole file (text as UTF-8), atomically replacing what was there.

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


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: it cannot be read, or is not UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason}); restore the file or train again") from error


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
            if isinstance(where, str | os.PathLike) and not _belongs_to(Path(where), path):
                raise InputError(
                    f"{where}: cannot be read ({error.strerror}); check the path and its permissions"
                ) from error
            raise InputError(f"{where}: cannot be written ({error.strerror}); choose another path") from error
        raise


def _belongs_to(place: Path, dst: Path) -> bool:
    """Whether `place` is `dst`, a folder above it, or inside it or its temporary sibling, and so not an input file."""
    place, dst = place.absolute(), dst.absolute()
    within = (place, *place.parents)
    return place in dst.parents or dst in within or any(_is_partial(above, dst) for above in within)


def _is_partial(place: Path, dst: Path) -> bool:
    return place.parent == dst.parent and place.name.startswith(f".{dst.name}.") and place.name.endswith(".partial")


def _make_partial(dst: Path, needs: int) -> int:
    """Makes the temporary sibling of `dst` and returns its number."""
    _check_place(dst, needs)
    number = secrets.randbelow(2**31)
    _partial(dst, number).mkdir()
    return number


def _check_place(dst: Path, needs: int) -> None:
    """Refuses a place where something exists, or a disk without enough room."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InputError(f"{dst}: exists already; expected a new path; choose another or remove it first")
    if dst.name in ("", "..") or dst.is_symlink() or os.path.ismount(dst):
        # The result is renamed to `dst` at the end, which none of these allows.
        raise InputError(f"{dst}: is a link, a mount point or a folder without a name; name a new folder in it")
    dst.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(dst.parent).free
    if free < needs:
        raise InputError(f"{dst}: needs {needs:,} bytes, but the disk has {free:,} free; choose another disk")


def _partial(dst: Path, number: int) -> Path:
    return dst.parent / f".{dst.name}.{number:08x}.partial"


def leftovers(folder: Path) -> list[Path]:
    """What a killed process was writing in a folder and never renamed."""
    return list(folder.glob(".*.partial"))


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


def refuse_unwritable(folder: Path) -> None:
    """Refuses an unwritable place for output early; the final check comes when the folder is made.

    Raises:
        InputError: the nearest existing folder at or above it cannot be written into.
    """
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{above}: is not a folder that can be written into; choose another --output")
