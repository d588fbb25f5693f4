"""Optional dependencies: the packages of the extras in ``pyproject.toml``."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingPackageError(ValueError):
    """A package of an extra is not installed; the message is one line for the user."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import packages of the extra ``name`` in this block. Raises MissingPackageError if one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "kvpo"):
            raise
        raise MissingPackageError(
            f"{package} is not installed; install it with: pip install 'kvpo[{name}]'"
        ) from error
