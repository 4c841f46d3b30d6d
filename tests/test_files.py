import errno
import hashlib
import os
from pathlib import Path

import pytest

from efx_jax.errors import InputError
from efx_jax.files import atomic_file, atomic_folder, atomic_write, read_text, sha256_of
from efx_jax.parallel.hosts import meet


def _break_off(dst: Path, error: BaseException) -> None:
    with atomic_folder(dst) as partial:
        (partial / "file").write_text("half")
        raise error


def test_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    dst = tmp_path / "deep" / "dst"
    with atomic_folder(dst) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("whole")
        assert not dst.exists()
    assert (dst / "inner" / "file").read_text() == "whole"
    assert os.listdir(dst.parent) == ["dst"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_nothing_is_left_behind_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        _break_off(tmp_path / "dst", error)
    assert os.listdir(tmp_path) == []


def _break_off_file(dst: Path, error: BaseException) -> None:
    with atomic_file(dst) as partial:
        partial.write_text("half")
        raise error


def test_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    dst = tmp_path / "deep" / "dst"
    with atomic_file(dst) as partial:
        partial.write_text("whole")
        assert not dst.exists()
    assert dst.read_text() == "whole"
    with pytest.raises(ValueError, match="a bug"):
        _break_off_file(tmp_path / "deep" / "other", ValueError("a bug"))
    assert os.listdir(dst.parent) == ["dst"]


def test_place_that_a_new_file_cannot_take_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for name, words, needs in (("folder", "is a folder", 0), ("file", "exists already", 0), ("new", "needs", 1 << 60)):
        with pytest.raises(InputError, match=words), atomic_file(tmp_path / name, needs):
            pytest.fail("the body ran")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_shared_folder_of_one_process_is_like_its_own(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "dst", shared=True) as partial:
        (partial / "file").touch()
        assert meet(7) == [7]
    assert os.listdir(tmp_path) == ["dst"]
    with pytest.raises(ValueError, match="a bug"), atomic_folder(tmp_path / "other", shared=True):
        raise ValueError("a bug")
    assert os.listdir(tmp_path) == ["dst"]


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "old").write_text("old")
    with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path / "dst"):
        pytest.fail("the body ran")
    assert os.listdir(tmp_path / "dst") == ["old"]


def test_what_cannot_be_renamed_over_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    for place in (tmp_path / "link", tmp_path / "dangling", Path()):
        with pytest.raises(InputError, match="is a link, a mount point or"), atomic_folder(place):
            pytest.fail("the body ran")
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(InputError, match="is a link, a mount point or"), atomic_folder(tmp_path / "empty"):
        pytest.fail("the body ran")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "link"]


def test_existing_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    with atomic_folder(tmp_path / "dst") as partial:
        (partial / "file").touch()
    assert os.listdir(tmp_path / "dst") == ["file"]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the disk is full") as caught:
        _break_off(tmp_path / "dst", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_place_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), atomic_folder(tmp_path / "file" / "dst"):
        pytest.fail("the body ran")
    with pytest.raises(InputError, match="cannot be written"):
        atomic_write(tmp_path / "file" / "dst", b"")


def test_a_source_that_cannot_be_read_is_not_called_unwritable(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with (
        pytest.raises(InputError, match=f"^{tmp_path / 'src'}: cannot be read .*permissions$"),
        atomic_folder(tmp_path / "dst"),
    ):
        (tmp_path / "src").read_bytes()
    with pytest.raises(InputError, match=r"\.partial: cannot be written"), atomic_folder(tmp_path / "dst") as partial:
        partial.write_bytes(b"")
    assert os.listdir(tmp_path) == ["src"]


def test_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        atomic_write(tmp_path, b"x")
    assert not list(tmp_path.iterdir())


def test_text_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("é\n".encode())
    assert read_text(tmp_path / "text") == "é\n"
    (tmp_path / "text").write_bytes(b"\xe9")
    for path, complaint in (
        (tmp_path / "text", "is not UTF-8"),
        (tmp_path / "gone", "No such file"),
        (tmp_path, "cannot"),
    ):
        with pytest.raises(InputError, match=complaint):
            read_text(path)


def test_new_folder_and_file_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual.txt").touch()
    with atomic_folder(tmp_path / "dst"):
        pass
    atomic_write(tmp_path / "dst.txt", "")
    assert (tmp_path / "dst").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "dst.txt").stat().st_mode == (tmp_path / "usual.txt").stat().st_mode


def test_written_file_replaces_the_old_one(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "old")
    atomic_write(tmp_path / "file", "é")
    assert (tmp_path / "file").read_bytes() == "é".encode()
    assert os.listdir(tmp_path) == ["file"]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes" * 100_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"bytes" * 100_000).hexdigest()
