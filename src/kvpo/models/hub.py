"""Models and checkpoints from a local path or a repository of the Hugging Face hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import cast

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kvpo.files import local_path

_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>[^\\]+))?")
# Base error class of the hub client's network library, which depends on the client's version.
_NetworkError = cast(type[Exception], HfHubHTTPError.__bases__[0])
_FILE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".json", ".jsonl", ".txt", ".yaml", ".yml"}


def split_entry(location: str) -> tuple[str, str | None]:
    """Split FILE#ENTRY into the file and its entry; an existing path of the whole name has no entry."""
    file, mark, entry = location.rpartition("#")
    if not mark or not file or local_path(location, "path").exists():
        return location, None
    return file, entry or None


def resolve_location(
    location: str | Path, *, patterns: Sequence[str] = (), beside: Sequence[str] = (), download: bool = True
) -> Path:
    """Local path of a file or directory given by a path or a hub id.

    A hub id is ``owner/name`` for a whole repository or ``owner/name/path/in/repository`` for one file, both
    optionally with ``@revision`` after the name. An existing local path takes precedence. Downloads go to the
    hub's shared cache. An interrupted download resumes where it stopped, and later runs keep every finished
    file. With the environment variable HF_HUB_OFFLINE=1, only the cache is used.

    Args:
        patterns: file patterns of a repository to download; empty means all of it.
        beside: names of files to fetch along with a single file, from its folder, if they exist.
        download: if False, use only the cache.

    Raises:
        ValueError: neither a local path nor a hub id, or a repository, revision or file that does not exist,
            needs a login, or cannot be reached.
    """
    local = local_path(location, "path")
    if local.exists():
        return local
    match = _HUB.fullmatch(str(location))
    if match is None or (match["file"] is None and local.suffix in _FILE_SUFFIXES):
        raise ValueError(
            f"{location}: no such file or directory, and not a hub id (owner/name or owner/name/file)"
        )
    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        if file is not None:
            found = hf_hub_download(repo, file, revision=revision, local_files_only=not download)
            for name in beside:
                _fetch_if_there(repo, str(PurePosixPath(file).with_name(name)), revision, download)
            return Path(found)
        found = snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns) or None, local_files_only=not download
        )
    except (OSError, _NetworkError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{location}: no such local path, and {_why(error, match, download)}") from error
    directory = Path(found)
    if not any(path.is_file() for path in directory.rglob("*")):
        raise ValueError(f"{location}: no file of the hub repository {repo} matches {', '.join(patterns)}")
    return directory


def is_repository(name: str) -> bool:
    """True for owner/name without a revision or a file."""
    match = _HUB.fullmatch(name)
    return match is not None and match["repo"] == name


def repository_of(location: str) -> str | None:
    """Hub repository, owner/name, of a location (also of the form FILE#ENTRY); None for a local path."""
    file, _ = split_entry(location)
    match = None if not file or local_path(file, "path").exists() else _HUB.fullmatch(file)
    return match["repo"] if match else None


def push_files(files: Mapping[str, Path], repo: str, place: Path) -> str:
    """Upload files to a model repository of the hub, owner/name, and return its URL.

    ``files`` maps names in the repository to local files, and ``place`` is the local file or directory that
    messages refer to. A new repository is private. Hub and login are those of ``huggingface_hub``
    (HF_ENDPOINT, HF_TOKEN).

    Raises:
        ValueError: invalid repository name, no login, no write permission, or no connection.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.create_commit(
            repo_id=repo,
            operations=[CommitOperationAdd(name, str(file)) for name, file in files.items()],
            commit_message=f"{place.name}, by kvpo export",
        )
    except (OSError, ValueError, _NetworkError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--push {repo}: {reason}; {place} is complete: once that is put right (a login is made with "
            f"`hf auth login`), `hf upload {repo} {place}` uploads it"
        ) from error
    return f"{api.endpoint}/{repo}"


def _fetch_if_there(repo: str, file: str, revision: str | None, download: bool) -> None:
    try:
        hf_hub_download(repo, file, revision=revision, local_files_only=not download)
    except EntryNotFoundError as error:
        # Offline, a file that is not in the cache did not exist when the main file was fetched.
        if isinstance(error, LocalEntryNotFoundError) and download and not constants.HF_HUB_OFFLINE:
            raise


def _why(error: Exception, match: re.Match[str], download: bool) -> str:
    """One line on what went wrong with a hub repository and what to do about it."""
    repo = match["repo"]
    if isinstance(error, GatedRepoError):
        return (
            f"the hub repository {repo} is gated: accept its terms at https://huggingface.co/{repo} "
            "and log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no repository {repo}; if it is private, log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub repository {repo} has no revision {match['revision']}"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        if not download:
            return f"the hub's cache holds no copy of {repo}: a run downloads it"
        if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
            return (
                f"HF_HUB_OFFLINE is set, and the hub's cache holds no copy of {repo}: run once with a "
                f"connection, or `hf download {repo}` on a machine that has one"
            )
        return f"the hub cannot be reached and its cache holds no copy of {repo}: {error}"
    if isinstance(error, EntryNotFoundError):
        return f"the hub repository {repo} has no file {match['file']}"
    return f"downloading from the hub failed ({error}); run again: finished files are kept"
