"""A file is whole or not there; refusals of the file system become errors with a way out."""

import errno
import os
import re
from pathlib import Path

import pytest
from system_calls import record_calls

from tokscale.base.errors import DataError, StorageError
from tokscale.base.files import atomic_write, new_folder, read_json, refusal_of, sha256_file, storage_errors, write_json
from tokscale.checkpoint.disk import refusals


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"step": 1})
    with pytest.raises(RuntimeError, match="halfway"), atomic_write(path, "w") as file:
        file.write("{")
        raise RuntimeError("halfway")
    assert read_json(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_bytes_are_on_the_medium_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls, path, sizes = record_calls(monkeypatch), tmp_path / "a.json", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (sizes.append(os.fstat(descriptor).st_size), sync(descriptor)))
    with atomic_write(path, "w") as file:
        file.write("12345")
    named = calls.index(("rename", "a.json"))
    assert calls.synced(path) < named < calls.synced(tmp_path, named)
    assert sizes[0] == 5  # nothing waits in the process's own buffer


def test_a_full_disk_is_a_storage_error_that_names_the_path(tmp_path):
    with (
        pytest.raises(StorageError, match=r"shard-3.tar: No space left on device; free space"),
        storage_errors("shard-3.tar"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert StorageError.exit_code == 74


def test_a_refusal_names_the_file_that_was_asked_for_and_not_its_partial(tmp_path):
    (tmp_path / "folder").mkdir()
    named = f"^{re.escape(str(tmp_path))}/folder: .* a folder is where a file is wanted"
    with pytest.raises(StorageError, match=named) as told, atomic_write(tmp_path / "folder") as file:
        file.write(b"x")
    assert "partial" not in str(told.value) and not list(tmp_path.glob(".*"))
    with pytest.raises(StorageError, match="/" + "n" * 300 + ": ") as told, atomic_write(tmp_path / ("n" * 300)):
        pass
    assert "partial" not in str(told.value)


def test_other_os_errors_stay_what_they_are():
    with pytest.raises(FileNotFoundError), storage_errors("x"):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "m.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"m.json: not valid JSON"):
        read_json(tmp_path / "m.json")
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "absent.json")


def test_sha256_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


NUMBERS = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOENT ENOTDIR EISDIR EEXIST ENOTEMPTY ENAMETOOLONG ELOOP ESTALE EIO"


@pytest.mark.parametrize("name", NUMBERS.split())
def test_whatever_the_file_system_answers_names_the_file_and_a_way_out(name):
    number = getattr(errno, name)
    with pytest.raises(StorageError) as caught, storage_errors("run"):
        raise OSError(number, os.strerror(number), "run/logs/rank_0000.log")
    said = str(caught.value)
    assert caught.value.exit_code == 74 and said.startswith(f"run/logs/rank_0000.log: {os.strerror(number)}; ")
    assert len(said) > 80  # there is a way out


def test_what_is_no_affair_of_a_file_passes():
    with pytest.raises(ConnectionError), storage_errors("run"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


def test_an_error_without_a_number_is_told_in_its_own_words():
    for error, told in (
        (OSError("the mount went away"), "the mount went away"),
        (OSError(), "OSError"),
        (OSError(0, ""), "[Errno 0] "),
        (OSError(errno.ESTALE, "x"), os.strerror(errno.ESTALE)),
    ):
        assert refusal_of(error) == told and "Success" not in told
        with (
            pytest.raises(StorageError, match=re.escape(f"shard: {told}; nothing was exported;")),
            refusals(Path("shard"), "nothing was exported"),
        ):
            raise error


def test_a_new_folder_is_never_one_that_was_there(tmp_path):
    made = [new_folder(tmp_path / "submitted/20260101_120000") for _ in range(3)]
    assert [path.name for path in made] == ["20260101_120000", "20260101_120000.01", "20260101_120000.02"]
    assert sorted((tmp_path / "submitted").iterdir()) == made
