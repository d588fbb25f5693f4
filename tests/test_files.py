import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvpo.files import (
    StorageError,
    cache_directory,
    named_list,
    new_directory,
    new_file,
    parse_json,
    read_json,
    read_text,
    refuse_pointers,
    remove_directory,
    remove_leftovers,
    write_atomic,
)


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"cannot save .*summary.json: the disk is full") as caught:
        write_atomic(path, "new")
    assert str(caught.value).count("\n") == 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "update-000001"
    with new_directory(path) as directory:
        (directory / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="the disk is full"), new_directory(path) as directory:
        (directory / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_write_limit_is_reported(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from kvpo.files import StorageError, write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "path = Path(sys.argv[1])\nwrite_atomic(path, 'old')\n"
        "try:\n    write_atomic(path, 'x' * 5000)\nexcept StorageError as error:\n    print(error)\n"
    )
    path = tmp_path / "f"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert f"cannot save {path}: File too large" in done.stdout
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "update-000001"
    for content in ("first", "second"):
        with new_directory(path) as directory:
            (directory / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["second"]
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames, the old one has another name; it is restored, even after a kill."""
    path, rename = tmp_path / "d", os.replace
    with new_directory(path) as directory:
        (directory / "a").write_text("old")

    def failing(source: Path, target: Path) -> None:
        if target == path and ".incomplete-old" not in source.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StorageError), new_directory(path) as directory:
        (directory / "a").write_text("new")
    monkeypatch.undo()
    assert (path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["d"]
    path.rename(tmp_path / ".incomplete-old-d")
    remove_leftovers(tmp_path)
    assert (path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_processes_of_equal_numbers_do_not_write_to_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, the first processes of two containers that share a directory."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with new_file(tmp_path / "a") as one, new_file(tmp_path / "a") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_directory(tmp_path / "x") as directory:
        (directory / "a").write_text("half")
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    (tmp_path / ".incomplete-1-update-000001").mkdir()
    (tmp_path / ".incomplete-1-update-000001" / "a").write_text("half")
    (tmp_path / ".incomplete-1-config.yaml").write_text("half")
    (tmp_path / "kept").write_text("whole")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "gone").mkdir()
    remove_directory(tmp_path / "gone")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask_whatever_writes(tmp_path: Path, mask: int) -> None:
    """For example, safetensors makes files that only their owner may read."""
    before = os.umask(mask)
    try:
        with new_file(tmp_path / "a.safetensors") as file:
            save_file({"x": torch.zeros(2)}, file)
        with new_directory(tmp_path / "new") as directory:
            save_file({"x": torch.zeros(2)}, directory / "b.safetensors")
            (directory / "c.json").write_text("{}")
    finally:
        os.umask(before)
    files = [tmp_path / "a.safetensors", tmp_path / "new" / "b.safetensors", tmp_path / "new" / "c.json"]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == [oct(0o666 & ~mask)] * 3
    assert oct((tmp_path / "new").stat().st_mode & 0o777) == oct(0o777 & ~mask)


def test_a_file_whose_writer_fails_is_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), new_file(path) as file:
        file.write_text("half")
        raise RuntimeError("stopped")
    with (
        pytest.raises(StorageError, match="cannot save .*x: No space"),
        new_file(path, failures=(RuntimeError,)),
    ):
        raise RuntimeError("No space")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("x", "old")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ('{"a": "\\ud83d"}', "half of a character"),
        ('{"\\uDC00": 1}', "half of a character"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        ('{"a": ', "Expecting value at position 7"),
        ("", "Expecting value at position 1"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_json_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_json(tmp_path / "x.json")
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}: ") and "\n" not in str(caught.value)


def test_a_repeated_field_among_very_many_is_found_at_once() -> None:
    fields = ",".join(f'"{n}": 0' for n in range(20_000))
    began = time.process_time()
    with pytest.raises(ValueError, match="'19999' is given twice"):
        parse_json(f'{{{fields}, "19999": 1}}')
    assert time.process_time() - began < 3, "a message of this kind must not hold up a server"


def test_json_with_whole_characters_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('\ufeff{"a": "\\ud83d\\ude00", "b": [[[]]]}')
    assert read_json(tmp_path / "x.json") == {"a": "😀", "b": [[[]]]}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda part: st.lists(part)
                    | st.dictionaries(st.text(), part)))  # fmt: skip
def test_whatever_is_written_is_read_again(value: object) -> None:
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value, ensure_ascii=False))


def test_pointers_of_git_lfs_are_refused(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (tmp_path / "x.txt").write_text(pointer)
    (tmp_path / "y.txt").write_text("version https://git-lf is not one")
    refuse_pointers(tmp_path / "y.txt", tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "x.txt"):
        with pytest.raises(ValueError, match="x.txt: a Git LFS pointer, not the file itself; run `git lfs"):
            refuse_pointers(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\r\noid sha256:00\r\n",
            "Git LFS .* `git lfs pull`",
        ),
        (b"version https://hawser.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"version http://git-media.io/v/2\noid sha256:00\n", "Git LFS pointer"),
        (b"/annex/objects/SHA256E-s1048576--4d7a21.mp4\n", "git-annex pointer, .* run `git annex get`"),
    ],
)
def test_pointers_of_every_kind_are_refused_wherever_a_file_is_read(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    for read in (refuse_pointers, read_text):
        with pytest.raises(ValueError, match=f"x.txt: a {message}"):
            read(tmp_path / "x.txt")


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such file"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path}: a directory"):
        read_text(tmp_path)
    (tmp_path / "x").write_bytes(b"a\nb\xe4r")
    with pytest.raises(ValueError, match="x, line 2: not UTF-8 text .byte 0xe4 at position 2"):
        read_text(tmp_path / "x")


def test_the_variable_that_names_no_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVPO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory("x") == tmp_path / "kvpo" / "x"
    for variable in ("XDG_CACHE_HOME", "KVPO_CACHE"):
        monkeypatch.setenv(variable, "~nobody-of-this-name/x")
        with pytest.raises(ValueError, match=f"{variable}: ~nobody-of-this-name/x: "):
            cache_directory("x")


def test_long_lists_of_names_are_cut() -> None:
    assert named_list("abc") == "a, b, c"
    assert named_list(map(str, range(14))).endswith("10, 11 and 2 more")
    assert named_list("abc", 1) == "a and 2 more"
