"""The memory bank as published, for comparisons with the public code."""

from typing import ClassVar

from kvpo.models.settings import Deployment


class PublishedBank(Deployment):
    """A deployment whose bank has the quirks of the published one."""

    bank_as_published: ClassVar[bool] = True


def deployment(*, bank_as_published: bool = False, **fields: int | bool) -> Deployment:
    """A deployment with this library's bank, or the published one."""
    return (PublishedBank if bank_as_published else Deployment)(**fields)  # type: ignore[arg-type]
