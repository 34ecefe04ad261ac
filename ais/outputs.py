"""Whose output a folder holds, so that no job writes into another's."""

from __future__ import annotations

from ais.errors import ConfigError
from ais.storage import Storage

# The file that says that the output of a job is there.
_RECORDS = {
    "head.json": "a head of jobs/train.py",
    "run.json": "a run of jobs/heatmaps.py",
    "latest.json": "the scores of jobs/score.py",
    "importance.json": "an importance of jobs/importance.py",
    "validation.json": "a validation of jobs/validate.py",
    "matrices.parquet": "a comparison of jobs/compare.py",
}


def check_output(address: str, own: str, storage: Storage) -> None:
    """Refuse a folder that holds the output of another job: files of both have the same names.

    Args:
        address: of the folder; need not exist.
        own: record of the job that asks, such as ``"head.json"``.
        storage: how to reach it.

    Raises:
        ConfigError: somebody else's record is there.
        StorageError: it cannot be read.
    """
    folder = storage.open(address)
    for name, what in _RECORDS.items():
        if name != own and (folder / name).exists():
            raise ConfigError(f"output: {address!r} holds {what}; give another output")
