"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dopt_api.errors import OutputError
from dopt_api.files import staged, write_text

posix = pytest.mark.skipif(os.name != "posix", reason="uses devices and limits of POSIX")


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_together_when_the_block_succeeds(tmp_path):
    (tmp_path / "b.txt").write_text("old")
    with staged(tmp_path) as aside:
        (aside / "a.txt").write_text("first")
        (aside / "b.txt").write_text("second")
        assert (tmp_path / "b.txt").read_text() == "old"
        assert not (tmp_path / "a.txt").exists()
    assert tree(tmp_path) == {"a.txt": "first", "b.txt": "second"}
    assert names(tmp_path) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_in_the_block_leaves_everything_as_it_was(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")

    def fail():
        with staged(tmp_path) as aside:
            (aside / "a.txt").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@posix
def test_a_full_disk_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def write_more_than_fits():
        with staged(tmp_path) as aside:
            (aside / "a.txt").write_text("new")
            (aside / "b.txt").symlink_to("/dev/full")
            (aside / "b.txt").write_text("more")

    with pytest.raises(OutputError, match=r"failed: No space left on device.*Free some space") as caught:
        write_more_than_fits()
    assert caught.value.where == str(tmp_path)
    assert tree(tmp_path) == {"a.txt": "old"}
    assert names(tmp_path) == ["a.txt"]


@posix
def test_a_text_too_long_for_the_disk_leaves_the_old_file(tmp_path):
    import resource

    target = tmp_path / "config.json"
    target.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, hard))
    try:
        with pytest.raises(OutputError, match="failed: File too large"):
            write_text(target, "x" * 2**23)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == {"config.json": "old"}


def test_a_disk_that_fills_up_while_writing_text(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_text(tmp_path / "a.txt", "text")
    assert names(tmp_path) == []


def test_a_folder_in_the_way_of_one_file_keeps_back_all(tmp_path):
    (tmp_path / "b.txt").mkdir()

    def write_both():
        with staged(tmp_path) as aside:
            (aside / "a.txt").write_text("first")
            (aside / "b.txt").write_text("second")

    with pytest.raises(OutputError, match=r"b\.txt' is a directory"):
        write_both()
    assert names(tmp_path) == ["b.txt"]


KILLED = """
import os, pathlib, signal, sys
from dopt_api.files import staged
with staged(sys.argv[1]) as aside:
    (aside / "a.txt").write_text("half of")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert names(left) == ["a.txt"]
    with staged(tmp_path) as living:
        (living / "b.txt").write_text("first")
        assert names(tmp_path) == [living.name]
        write_text(tmp_path / "c.txt", "second")
    assert names(tmp_path) == ["b.txt", "c.txt"]


def test_a_missing_directory(tmp_path):
    with pytest.raises(OutputError, match=r"does not exist.*os.makedirs") as caught, staged(tmp_path / "no"):
        pytest.fail("the block must not run")
    assert caught.value.where == str(tmp_path / "no")
    with pytest.raises(OutputError, match="does not exist"):
        write_text(tmp_path / "no" / "a.txt", "text")
    assert names(tmp_path) == []


def test_a_file_where_a_directory_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file' is a file"), staged(tmp_path / "file"):
        pytest.fail("the block must not run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        write_text(tmp_path / "a.txt", "text")


def test_a_directory_that_takes_no_new_files(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(OutputError, match=r"failed: Permission denied.*a writable directory"):
        write_text(tmp_path / "a.txt", "text")


def test_a_directory_instead_of_a_file(tmp_path):
    with pytest.raises(OutputError, match=r"is a directory.*config_gen.json"):
        write_text(tmp_path, "text")


def test_text_is_utf8_with_unix_line_ends(tmp_path):
    assert write_text(tmp_path / "a.txt", "层\nnext\n") == tmp_path / "a.txt"
    assert (tmp_path / "a.txt").read_bytes() == "层\nnext\n".encode()


def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / "real.txt"
    target.write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(Path("data") / "real.txt")
    assert write_text(link, "new") == link
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert names(tmp_path) == ["data", "link.txt"]


def test_a_symbolic_link_to_a_file_that_does_not_exist_yet(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "later.txt")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "later.txt").read_text() == "new"


def test_a_symbolic_link_to_itself_is_replaced(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to(link)
    write_text(link, "new")
    assert link.read_text() == "new"


@pytest.mark.parametrize("name", ["with space", "项目", "naïve-ümlaut", "a'b\"c"])
def test_names_of_any_kind(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write_text(str(folder / f"{name}.json"), "text")
    assert tree(folder) == {f"{name}.json": "text"}


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_text("a.txt", "text") == Path("a.txt")
    assert tree(tmp_path) == {"a.txt": "text"}
