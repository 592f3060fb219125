"""Regular files, files of names, and folders that cannot be synced."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from ckd import _files
from tests.bank_tools import write_bank


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"ant\nbee\n", ["ant", "bee"]),
        (b"ant\nbee", ["ant", "bee"]),
        (b"\xef\xbb\xbfant\r\nbee\r\n", ["ant", "bee"]),  # Windows
        (b"ant\rbee\r", ["ant", "bee"]),  # old spreadsheets
        ("a\u2028b\nc\x0cd\ne\x85f\x1cg\n".encode(), ["a\u2028b", "c\x0cd", "e\x85f\x1cg"]),
        (b" ant \n\xc3\xa9", [" ant ", "\xe9"]),
    ],
)
def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_dropped(tmp_path, data, lines):
    (tmp_path / "names.txt").write_bytes(data)
    assert _files.read_lines(tmp_path / "names.txt", KeyError) == lines


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\n", "line 1 is blank"),
        (b"ant\r\n \r\nbee\r\n", "line 2 is blank"),
        (b"ant\nbee\n\n", "line 3 is blank"),
        ("ant\nbee\n".encode("utf-16"), "not UTF-8"),
        ("ant\nbee\n".encode("utf-16-le"), "not UTF-8"),
        ("\xe9".encode("latin-1"), "not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_a_file_without_a_name_on_every_line_is_refused(tmp_path, data, says):
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(KeyError, match=rf"names\.txt.*{says}"):
        _files.read_lines(tmp_path / "names.txt", KeyError)


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _files.user_path("~/x") == tmp_path / "x"
    assert _files.user_path("x/~") == Path("x/~")


def fail_on_folders(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    """Let os.fsync or os.open fail with this error number for folders."""
    original = getattr(os, function)

    def failing(target, *args):
        status = os.fstat(target) if function == "fsync" else os.stat(target)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(number, os.strerror(number))
        return original(target, *args)

    monkeypatch.setattr(_files.os, function, failing)


@pytest.mark.parametrize("function", ["fsync", "open"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.EOPNOTSUPP])
def test_a_folder_that_the_file_system_cannot_sync_is_passed_over(
    tmp_path, monkeypatch, function, number
):
    with monkeypatch.context() as patches:
        fail_on_folders(patches, function, number)
        _files.atomic_write(tmp_path / "file", b"data")
        with _files.atomic_folder(tmp_path / "folder") as folder:
            _files.durable_write(folder / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
    assert (tmp_path / "folder" / "file").read_bytes() == b"data"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_sync_of_a_folder_that_failed_is_raised(tmp_path, monkeypatch, number):
    fail_on_folders(monkeypatch, "fsync", number)
    with pytest.raises(OSError, match=os.strerror(number)):
        _files.atomic_write(tmp_path / "file", b"data")


def test_a_bank_is_written_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    fail_on_folders(monkeypatch, "fsync", errno.EINVAL)
    assert len(write_bank(tmp_path / "bank")) == 50


def test_a_user_who_does_not_exist_has_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"no home folder.*~no-such-user/x"):
        _files.user_path("~no-such-user/x")


def make_odd_file(kind: str, path: Path) -> None:
    """Something at `path` that is no regular file."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a fifo":
        os.mkfifo(path.with_name("fifo"))
        path.symlink_to("fifo")
    else:
        path.symlink_to({"link to a device": "/dev/zero", "link to nothing": "nothing"}[kind])


ODD_FILES = ("fifo", "folder", "link to a fifo", "link to a device", "link to nothing")


@pytest.mark.parametrize("kind", ODD_FILES)
@pytest.mark.parametrize("follow", [False, True])
def test_only_regular_files_are_read(tmp_path, kind, follow):
    make_odd_file(kind, tmp_path / "file")
    descriptors = len(os.listdir("/dev/fd"))
    for read in (_files.check_regular, lambda path, **how: _files.read_regular(path, 9, **how)):
        with pytest.raises(OSError, match="file") as caught:
            read(tmp_path / "file", follow=follow)
        assert caught.value.filename == str(tmp_path / "file")
    assert len(os.listdir("/dev/fd")) == descriptors


def test_a_link_is_followed_only_where_the_user_names_it(tmp_path):
    (tmp_path / "file").write_bytes(b"123456789")
    (tmp_path / "link").symlink_to("file")
    assert _files.read_regular(tmp_path / "file", 9) == b"123456789"
    assert _files.read_regular(tmp_path / "link", 9, follow=True) == b"123456789"
    with pytest.raises(OSError, match="symbolic link"):
        _files.read_regular(tmp_path / "link", 9)
    with pytest.raises(OSError, match=r"9 bytes.*at most 8"):
        _files.read_regular(tmp_path / "file", 8)


def test_names_may_come_from_a_pipe(tmp_path):
    out, into = os.pipe()
    os.write(into, b"ant\nbee\n")
    os.close(into)
    assert _files.read_lines(f"/dev/fd/{out}", KeyError) == ["ant", "bee"]
    os.close(out)


def test_a_file_of_names_has_a_limit():
    with pytest.raises(KeyError, match="more than 67,108,864 bytes"):
        _files.read_lines("/dev/zero", KeyError)


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "link to a device", "link to nothing"])
def test_a_temporary_name_that_is_taken_leads_nowhere(tmp_path, kind):
    make_odd_file(kind, tmp_path / ".tmp-file")
    _files.atomic_write(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a fifo", "link to a device"])
def test_a_file_takes_the_place_of_no_device(tmp_path, kind):
    make_odd_file(kind, tmp_path / "file")
    before = (tmp_path / "file").lstat()
    with pytest.raises(OSError, match=r"not a regular file.*/file'"):
        _files.atomic_write(tmp_path / "file", b"data")
    assert (tmp_path / "file").lstat().st_ino == before.st_ino
    assert not (tmp_path / ".tmp-file").exists()


def test_an_error_without_a_path_gets_that_of_the_file(tmp_path, monkeypatch):
    def failing(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files.os, "fsync", failing)
    with pytest.raises(OSError, match=rf"No space left.*{tmp_path}/\.tmp-file'"):
        _files.atomic_write(tmp_path / "file", b"data")
    with pytest.raises(OSError, match=rf"No space left.*{tmp_path}'"):
        _files.fsync_folder(tmp_path)
    assert os.listdir(tmp_path) == []
