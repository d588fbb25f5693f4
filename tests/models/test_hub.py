"""Locations: local paths first, hub ids from the cache or by a download that can be continued."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kvpo.models import hub

CONTENT = b"".join(i.to_bytes(4, "big") for i in range(6_000_000))  # the hub client writes chunks of 10 MB
ETAG = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "a" * 40


def test_the_repository_of_a_location_is_named_unless_it_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("o/n", "o/n@v1", "o/n/a/b.pt", "o/n@v1/b.pt#ema"):
        assert hub.repository_of(given) == "o/n"
    assert hub.is_repository("o/n") and not any(map(hub.is_repository, ("o", "o/n/b.pt", "o/n@v1")))
    (tmp_path / "o" / "n").mkdir(parents=True)
    (tmp_path / "o" / "n" / "b.pt").write_bytes(b"x")
    assert not any(map(hub.repository_of, ("o/n", "o/n/b.pt", "o/n/b.pt#ema", "b.pt", "")))
    assert hub.is_repository("o/n")  # as a place to push to


def test_local_paths_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "base.pt").write_bytes(b"x")
    assert hub.resolve_location("owner/name") == Path("owner/name")
    assert hub.resolve_location(tmp_path / "base.pt") == tmp_path / "base.pt"


def test_an_entry_of_a_file_stands_behind_a_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.split_entry("a/base.pt#generator_ema") == ("a/base.pt", "generator_ema")
    assert hub.split_entry("owner/name@v1/x.pt#ema") == ("owner/name@v1/x.pt", "ema")
    for plain in ("a/base.pt", "", "#x"):
        assert hub.split_entry(plain) == (plain, None)
    assert hub.split_entry("a/base.pt#") == ("a/base.pt", None)
    (tmp_path / "take #3.pt").touch()
    assert hub.split_entry("take #3.pt") == ("take #3.pt", None), "a file of that name exists"
    with pytest.raises(ValueError, match="~nobody-of-that-name/x.pt#ema"):
        hub.split_entry("~nobody-of-that-name/x.pt#ema")


@pytest.mark.parametrize(
    "location", ["missing.pt", "checkpoints/missing.pt", "/no/such/dir", "./a/b", "name", "C:\\weights\\x.pt"]
)
def test_paths_that_do_not_exist_are_not_looked_up_on_the_hub(location, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", None)
    monkeypatch.setattr(hub, "hf_hub_download", None)
    with pytest.raises(ValueError, match="no such file or directory, and not a hub id"):
        hub.resolve_location(location)


def test_hub_ids_are_split_into_repository_revision_and_file(tmp_path, monkeypatch):
    calls = []

    def file(repo, name, *, revision, local_files_only):
        calls.append((repo, name, revision))
        return str(tmp_path / "f")

    def snapshot(repo, *, revision, allow_patterns, local_files_only):
        calls.append((repo, revision, allow_patterns))
        return str(tmp_path)

    (tmp_path / "f").touch()
    monkeypatch.setattr(hub, "hf_hub_download", file)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert hub.resolve_location("Efficient-Large-Model/LongLive-1.3B/models/lora.pt") == tmp_path / "f"
    assert hub.resolve_location("owner/name@v1.0/x.pt") == tmp_path / "f"
    assert hub.resolve_location("Wan-AI/Wan2.1-T2V-1.3B", patterns=("vae/*",)) == tmp_path
    assert hub.resolve_location("owner/name@abc") == tmp_path
    assert calls == [
        ("Efficient-Large-Model/LongLive-1.3B", "models/lora.pt", None),
        ("owner/name", "x.pt", "v1.0"),
        ("Wan-AI/Wan2.1-T2V-1.3B", None, ["vae/*"]),
        ("owner/name", "abc", None),
    ]


@pytest.mark.parametrize("location", ["owner/name", "owner/name/x.pt"])
def test_offline_mode_names_the_way_out(location, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="HF_HUB_OFFLINE is set, and .* no copy of owner/name: .* `hf download owner/name`"
    ):
        hub.resolve_location(location)


@pytest.mark.parametrize("location", ["owner/name", "owner/name/x.pt"])
def test_without_download_the_cache_alone_is_asked(location, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="the hub's cache holds no copy of owner/name: a run downloads it"):
        hub.resolve_location(location, download=False)


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(ValueError, match=r"no file of the hub repository owner/name matches \*.pth, x/\*"):
        hub.resolve_location("owner/name", patterns=("*.pth", "x/*"))


def bare(kind: type[Exception], *args: object) -> Exception:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (bare(GatedRepoError, "403"), "is gated: accept its terms at https://huggingface.co/owner/name"),
        (bare(RepositoryNotFoundError, "404"), "the hub has no repository owner/name"),
        (bare(RevisionNotFoundError, "404"), "has no revision v2"),
        (bare(RemoteEntryNotFoundError, "404"), "has no file x.pt"),
        (LocalEntryNotFoundError("no route"), "cannot be reached and its cache holds no copy .* no route"),
        (OSError("No space left on device"), "No space left on device.*run again: finished files are kept"),
    ],
)
def test_hub_errors_become_one_clear_error(error, message, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=message):
        hub.resolve_location("owner/name@v2/x.pt")


class FakeHub(BaseHTTPRequestHandler):
    """Serves files whose transfer breaks off halfway, and refuses the rest of one of them."""

    starts: list[tuple[str, int]] = []

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, length: int) -> None:
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{ETAG}"', "Accept-Ranges": "bytes"}
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_HEAD(self) -> None:
        self.answer(200, len(CONTENT))

    def do_GET(self) -> None:
        if "/resolve/" not in self.path:
            return self.answer(404, 0)
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        name = self.path.rsplit("/", 1)[-1]
        self.starts.append((name, start))
        if start and name == "refused.pt":
            return self.answer(403, 0)
        self.answer(206 if start else 200, len(CONTENT) - start)
        self.wfile.write(CONTENT[start : None if start else len(CONTENT) // 2])
        self.close_connection = True


PROGRAM = """
from huggingface_hub import constants
from kvpo.models.hub import resolve_location
try:
    resolve_location("owner/name/refused.pt")
except ValueError as error:
    print(error)
print(resolve_location("owner/name/model.pt"))
constants.HF_HUB_OFFLINE = True
print(resolve_location("owner/name/model.pt"))
"""


def test_a_broken_transfer_is_taken_up_where_it_broke(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The hub client reads its settings when it is imported, hence a process of its own.
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        command = [sys.executable, "-c", PROGRAM]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    *message, path, offline_path = result.stdout.splitlines()
    assert "owner/name/refused.pt: no such local path, and downloading from the hub failed" in message[0]
    assert "run again: finished files are kept" in message[-1]
    assert Path(path).read_bytes() == CONTENT and offline_path == path
    starts = [start for name, start in FakeHub.starts if name == "model.pt"]
    assert len(starts) == 2 and starts[0] == 0 and 5_000_000 < starts[1] <= len(CONTENT) // 2


def test_what_belongs_beside_a_file_is_fetched_where_it_exists(tmp_path, monkeypatch):
    there, calls = {"a/adapter_model.safetensors", "a/adapter_config.json"}, []

    def file(repo, name, *, revision, local_files_only):
        calls.append(name)
        if name not in there:
            raise errors[hub.constants.HF_HUB_OFFLINE]
        return str(tmp_path / name)

    response = SimpleNamespace(headers={}, request=None)
    errors = {True: LocalEntryNotFoundError("no"), False: RemoteEntryNotFoundError("no", response=response)}
    monkeypatch.setattr(hub, "hf_hub_download", file)
    beside, name = ("adapter_config.json",), "owner/name/a/adapter_model.safetensors"
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert hub.resolve_location(name, beside=beside) == tmp_path / "a/adapter_model.safetensors"
    assert calls == ["a/adapter_model.safetensors", "a/adapter_config.json"] * 2
    there.remove("a/adapter_config.json")
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert hub.resolve_location(name, beside=beside) == tmp_path / "a/adapter_model.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    errors[False] = LocalEntryNotFoundError("out of reach")
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        hub.resolve_location(name, beside=beside)
