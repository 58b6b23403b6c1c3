"""Files and folders of ours are there whole or not at all."""

import hashlib
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from everalign import storage as files
from everalign.errors import InputError
from everalign.storage import write_tensors


def fail_to_rename(*_):
    raise OSError("disk full")


def test_checksums_name_every_file_by_its_relative_path(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep" / "er" / "b.bin").write_bytes(bytes(3_000_000))
    found = files.checksums(tmp_path)
    assert found == {
        "a.txt": hashlib.sha256(b"one").hexdigest(),
        "deep/er/b.bin": hashlib.sha256(bytes(3_000_000)).hexdigest(),
    }
    assert set(files.checksums(tmp_path, exclude=frozenset({"a.txt"}))) == {"deep/er/b.bin"}


def test_differing_files_are_the_changed_and_the_missing(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    written = files.checksums(tmp_path)
    assert files.differing_files(tmp_path, written) == []
    (tmp_path / "a").write_text("A")
    (tmp_path / "b").unlink()
    assert files.differing_files(tmp_path, written) == ["a", "b"]


def test_write_text_makes_folders_and_leaves_nothing_beside_the_file(tmp_path):
    path = tmp_path / "new" / "file.txt"
    files.write_text(path, "grün\n")
    files.write_text(path, "blau\n")
    assert path.read_text(encoding="utf-8") == "blau\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(os, "replace", fail_to_rename)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_of_a_new_folder_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    """safetensors makes its files readable for their owner alone."""
    before = os.umask(umask)
    try:
        with files.new_folder(tmp_path / "out") as folder:
            (folder / "deep").mkdir()
            for path in (folder / "a.safetensors", folder / "deep" / "b.safetensors"):
                save_file({"x": torch.zeros(2)}, path)
            (folder / "c.txt").write_text("c")
            folder.joinpath("c.txt").chmod(0o600)
        write_tensors(tmp_path / "alone.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in written) == ["a.safetensors", "alone.safetensors", "b.safetensors", "c.txt"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {mode}


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "file.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_read_json_names_a_missing_and_a_damaged_file(tmp_path):
    with pytest.raises(InputError, match=r"run\.json: no such file"):
        files.read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"run\.json: damaged JSON .*restore"):
        files.read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"run\.json: damaged JSON"):
        files.read_json(tmp_path / "run.json")


def test_a_new_folder_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "versions" / "001-a"
    with files.new_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("x")
        assert not path.exists()
        assert files.is_partial(temporary)
    assert (path / "deep" / "file").read_text() == "x"
    assert not files.is_partial(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["inside", "at the rename"])
def test_a_crash_leaves_no_folder_and_the_next_attempt_starts_clean(tmp_path, monkeypatch, moment):
    path = tmp_path / "001-a"

    def attempt():
        with files.new_folder(path) as temporary:
            (temporary / "half").write_text("x")
            if moment == "inside":
                raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_to_rename)
        with pytest.raises(OSError, match="disk full"):
            attempt()
    assert not path.exists()
    assert all(files.is_partial(entry) for entry in tmp_path.iterdir())
    with files.new_folder(path) as temporary:
        (temporary / "whole").write_text("x")
    assert [entry.name for entry in path.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_folder_never_replaces_a_filled_one(tmp_path):
    path = tmp_path / "001-a"
    path.mkdir()
    (path / "kept").write_text("x")
    with pytest.raises(InputError, match="another process has written something there"), files.new_folder(path):
        pass
    assert [entry.name for entry in path.iterdir()] == ["kept"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no way to see which file a handle belongs to")
def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def note_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    with files.new_folder(tmp_path / "v") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("x")
    synced = set(events[: events.index("rename")])
    assert synced == {str(temporary), str(temporary / "deep"), str(temporary / "deep" / "file")}
    assert events[-1] == str(tmp_path)
