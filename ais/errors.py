"""Every error a user can cause, as one small family.

A message says what was found, where, and the way out. Jobs print it without a traceback and exit with 2
(nothing was started) or 1 (work was started and did not end well); the library raises it.
"""


class AisError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(AisError):
    """A configuration key is unknown, has the wrong type or an impossible value."""


class StorageError(AisError):
    """An address cannot be read, listed or written."""


class BackboneError(AisError):
    """A backbone or layer does not exist, or cannot do what is asked of it."""


class WeightsError(AisError):
    """A weights file cannot be had, is not what its digest says, or does not fit its backbone."""


class HeadError(AisError):
    """A head bundle is incomplete, or belongs to another backbone, weights or preprocessing."""


class RatingsError(AisError):
    """A table of ratings cannot be used as it is."""


class DatasetError(AisError):
    """The files of a published data set are not as they are published."""


class RunError(AisError):
    """A run folder is inconsistent, or a run did not account for every image."""


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
