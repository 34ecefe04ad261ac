"""Every error a user can cause, as one small family.

A message says what was found, where, and the way out. Jobs print it without a traceback and exit with 2 (the same
command would fail again), 3 (somebody else is at it) or 1 (work did not end well); the library raises it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any


class AisError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(AisError):
    """A configuration key is unknown, has the wrong type or an impossible value."""


class StorageError(AisError):
    """An address cannot be read, listed or written."""


class BackboneError(AisError):
    """A backbone or layer does not exist, or cannot do what is asked of it."""


class WeightsError(AisError):
    """A weights file is not there, is not what its digest says, or does not fit its backbone."""


class HeadError(AisError):
    """A head bundle is incomplete, or belongs to another backbone, weights or preprocessing."""


class RatingsError(AisError):
    """A table of ratings cannot be used as it is."""


class SimilarityError(AisError):
    """A human similarity matrix cannot be used as it is."""


class ImportanceError(AisError):
    """An importance bundle is incomplete, or belongs to another backbone, layer or head."""


class DatasetError(AisError):
    """The files of a published data set are not as they are published."""


class RunError(AisError):
    """A run folder is inconsistent, or a run did not account for every image."""


class TerminatedInterrupt(KeyboardInterrupt):
    """Somebody asked the process to end, as `ray job stop` and whatever drains a machine do (SIGTERM)."""


class ChangedError(AisError):
    """A file is another than the one that was meant."""


class DamagedError(AisError):
    """A file is not what was written; the message goes on after the file's name."""


class LockedError(AisError):
    """A folder is being written by somebody else; nothing was started.

    Args:
        address: of the lock.
        who: the holder in words.
        holder: what the lock says of its holder: ``host``, ``pid``, ``started`` and, in a submitted job, ``job``.
        expires_at: when the lock can be taken over, unless it is renewed before.
    """

    def __init__(self, address: str, who: str, holder: dict[str, Any], expires_at: datetime) -> None:
        super().__init__(
            f"{address!r} is held by {who}: it is writing there. Wait for it, or end it; if it is dead, its lock "
            f"expires at {expires_at:%Y-%m-%d %H:%M:%S} UTC"
        )
        self.address = address
        self.who = who
        self.holder = holder
        self.expires_at = expires_at

    def __reduce__(self) -> tuple[type, tuple[str, str, dict[str, Any], datetime]]:
        """Travel between processes with its parts."""
        return type(self), (self.address, self.who, self.holder, self.expires_at)


class LeaseLostError(AisError):
    """This process held a lock, did not renew it in time, and somebody else took it over."""


class ImageError(AisError):
    """One image cannot be used; becomes a row in ``errors``, never the end of a job.

    Args:
        stage: ``"fetch"`` or ``"decode"``.
        reason: short and countable, such as ``"truncated"``; details follow in ``detail``.
    """

    def __init__(self, stage: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.stage = stage
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Travel between processes with its parts."""
        return type(self), (self.stage, self.reason, self.detail)
