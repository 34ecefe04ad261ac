"""What a report is made of: a run, and what belongs to it. Everything is checked before a picture is made.

Only files of ours are read here, and only what is drawn; no weights are loaded, so nothing waits for torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ais.config import ReportConfig
from ais.errors import AisError, ConfigError, StorageError
from ais.importance import load_importance
from ais.outputs import check_output
from ais.runs import Run
from ais.storage import Folder, Storage, absolute, reading


@dataclass(frozen=True)
class Head:
    """A head bundle.

    Args:
        address: of its folder.
        record: ``head.json``.
        metrics: ``metrics.json``; empty where there is none.
        history: ``history.parquet``; ``None`` where there is none.
        predictions: ``predictions.parquet``, score, predicted; ``None`` where there is none.
    """

    address: str
    record: dict[str, Any]
    metrics: dict[str, Any]
    history: pa.Table | None
    predictions: pa.Table | None


@dataclass(frozen=True)
class Importance:
    """An importance bundle: its address, ``importance.json`` and ``importance.parquet``."""

    address: str
    record: dict[str, Any]
    table: pa.Table


@dataclass(frozen=True)
class Validation:
    """The output of a validation.

    Args:
        address: of its folder.
        record: ``validation.json``.
        curves: test value by number of maps; ``None`` where the protocol was refused.
        deletion: mean score along deletion and insertion; ``None`` where there is none.
    """

    address: str
    record: dict[str, Any]
    curves: pa.Table | None
    deletion: pa.Table | None


@dataclass(frozen=True)
class Comparison:
    """The output of a comparison: its address, ``summary.json`` and ``matrices.parquet``."""

    address: str
    record: dict[str, Any]
    matrices: pa.Table


@dataclass(frozen=True)
class Sources:
    """Everything that a report is made of.

    Args:
        config: with local paths absolute.
        storage: how to reach addresses.
        run: the run's folder.
        record: ``run.json``.
        summary: ``summary.json``; ``None`` where the run is not complete.
        run_config: ``config.yaml`` as text.
        head: if there is one.
        importance: any number.
        validation: if there is one.
        comparison: if there is one.
        notes: what was looked for and not found.
    """

    config: ReportConfig
    storage: Storage
    run: Run
    record: dict[str, Any]
    summary: dict[str, Any] | None
    run_config: str
    head: Head | None
    importance: Sequence[Importance]
    validation: Validation | None
    comparison: Comparison | None
    notes: Sequence[str]

    @property
    def output(self) -> Folder:
        """Where the pages go."""
        return self.storage.open(self.config.output)

    @property
    def untrained(self) -> bool:
        """Whether the backbone has random weights."""
        return bool(self.record["untrained"])

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """C, h, w of the layer."""
        channels, height, width = self.record["layer"]["map_shape"]
        return int(channels), int(height), int(width)

    @property
    def weighting(self) -> str:
        """``"positive"`` or ``"signed"``."""
        return str(self.record["identity"]["weighting"])

    @property
    def run_importance(self) -> Importance | None:
        """The bundle that weighs the heatmaps of this run; ``None`` where it was not found, or there is none."""
        digest = self.record["identity"].get("importance")
        return next((bundle for bundle in self.importance if bundle.record["sha256"] == digest), None)

    @property
    def is_compared(self) -> bool:
        """Whether this run is one of those of the comparison, wherever its folder was then: an id alone is no name."""
        own = self.record.get("run_id", self.run.run_id), self.record["identity"]
        runs = self.comparison.record["runs"] if self.comparison else []
        return any((run.get("run_id"), run.get("identity")) == own for run in runs)

    def describe(self) -> str:
        """Say in a few lines what the report would be made of."""
        state = "complete" if self.summary else "NOT COMPLETE: the report shows what is there so far"
        lines = [f"run         {self.run.folder.address} ({state})"]
        if self.head:
            lines.append(f"head        {self.head.address}")
        lines += [f"importance  {bundle.address}" for bundle in self.importance]
        if self.validation:
            lines.append(f"validation  {self.validation.address}")
        if self.comparison:
            lines.append(f"comparison  {self.comparison.address}")
        lines += [f"left out    {note}" for note in self.notes]
        return "\n".join([*lines, f"output      {self.output.address}"])


def open_sources(config: ReportConfig) -> Sources:
    """Read and check everything but the results.

    Raises:
        AisError: of the kind that fits: there is no run, or what was given belongs to another one.
    """
    storage = Storage(**config.storage.model_dump())
    addresses = {
        name: absolute(value)
        for name in ("run", "output", "head", "validation", "comparison")
        if (value := getattr(config, name))
    }
    config = config.model_copy(update={**addresses, "importance": tuple(map(absolute, config.importance))})
    run = Run(storage.open(config.run))
    check_output(config.output, "index.html", storage)
    record = run.record()
    if record is None:
        raise ConfigError(f"run: {config.run!r} holds no run (no run.json){_runs_below(run.folder)}")
    with _understood("run", config.run):
        identity = record["identity"]
        if "weighting" not in identity:
            raise ConfigError(
                f"run: {config.run!r} holds scores and no heatmaps; give a run of jobs/heatmaps.py, or of "
                "jobs/score.py with heatmaps=true"
            )
        found = (record["backbone"], record["layer"]["name"], record["layer"]["map_shape"], record["untrained"])
        assert len(found[2]) == 3
    run_config = _text(run.folder / "config.yaml")
    named = _configured(run_config)
    notes: list[str] = []

    head = None
    if config.head:
        head = _open_head(config.head, identity.get("head"), storage)
    elif named.get("head"):
        try:
            head = _open_head(str(named["head"]), identity.get("head"), storage)
        except AisError as error:
            notes.append(f"the head that the run was made with: {error}")
    importance = [_open_importance(address, record, storage) for address in config.importance]
    if (own := named.get("importance")) and absolute(str(own)) not in config.importance:
        try:
            importance.insert(0, _open_importance(str(own), record, storage))
        except AisError as error:
            notes.append(f"the importance that the run was made with: {error}")
    return Sources(
        config,
        storage,
        run,
        record,
        run.complete(),
        run_config,
        head,
        importance,
        _open_validation(config.validation, record, storage) if config.validation else None,
        _open_comparison(config.comparison, storage) if config.comparison else None,
        notes,
    )


def _configured(text: str) -> dict[str, Any]:
    """Return the configuration of a run, empty where it cannot be read: the report does without."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _runs_below(folder: Folder) -> str:
    """Ids of the runs that the user may have meant."""
    for place in (folder, folder / "runs"):
        try:
            entries = place.filesystem.ls(place.path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            continue
        names = [str(entry["name"]).rstrip("/") for entry in entries if entry["type"] == "directory"]
        found = sorted(name for name in names[:100] if (Folder(place.filesystem, name) / "run.json").exists())
        if found:
            addresses = [Folder(place.filesystem, name).address for name in found[:3]]
            return f"; did you mean {' or '.join(map(repr, addresses))}?"
    return "; give the folder OUTPUT/runs/RUN_ID that jobs/heatmaps.py printed"


def _open_head(address: str, digest: str | None, storage: Storage) -> Head:
    folder = storage.open(absolute(address))
    record = _json(folder, "head.json", "a head bundle", "jobs/train.py")
    if record.get("sha256") != digest:
        raise ConfigError(
            f"head: the run was made with the head {str(digest)[:16]}…, {address!r} is "
            f"{str(record.get('sha256'))[:16]}…"
        )
    with _understood("head", address):
        predictions = _table(folder / "predictions.parquet", ["score", "predicted"])
        history = _table(folder / "history.parquet", ["variant", "epoch", "train_rmse", "validation_rmse"])
        metrics = json.loads(_text(folder / "metrics.json") or "{}")
    return Head(folder.address, record, metrics if isinstance(metrics, dict) else {}, history, predictions)


def _open_importance(address: str, run: dict[str, Any], storage: Storage) -> Importance:
    load_importance(absolute(address), storage)  # checks the table against its digest
    folder = storage.open(absolute(address))
    record = _json(folder, "importance.json", "an importance bundle", "jobs/importance.py")
    for key, found, wanted in (
        ("backbone", record["backbone"], run["backbone"]),
        ("layer", record["layer"], run["layer"]["name"]),
        ("weights", record["weights_fingerprint"], run["weights"]["fingerprint"]),
    ):
        if found != wanted:
            raise ConfigError(f"importance: {address!r} belongs to {key} {found!r}, the run to {wanted!r}")
    table = _table(folder / "importance.parquet")
    assert table is not None  # load_importance has read it
    return Importance(folder.address, record, table)


def _open_validation(address: str, run: dict[str, Any], storage: Storage) -> Validation:
    folder = storage.open(absolute(address))
    record = _json(folder, "validation.json", "the output of a validation", "jobs/validate.py")
    if record.get("head") != run["identity"].get("head") or record.get("layer") != run["layer"]["name"]:
        raise ConfigError(
            f"validation: {address!r} is about head {str(record.get('head'))[:16]}… at layer {record.get('layer')!r}, "
            f"the run was made with {str(run['identity'].get('head'))[:16]}… at {run['layer']['name']!r}"
        )
    with _understood("validation", address):
        _ = record["conclusion"], record["checks"], record["images"]["rated"]
        curves = _table(folder / "curves.parquet", ["measure", "order", "maps", "test"])
        deletion = _table(folder / "deletion.parquet", ["fill", "mode", "method", "share", "score"])
    return Validation(folder.address, record, curves, deletion)


def _open_comparison(address: str, storage: Storage) -> Comparison:
    folder = storage.open(absolute(address))
    record = _json(folder, "summary.json", "the output of a comparison", "jobs/compare.py")
    with _understood("comparison", address):
        _ = [run["name"] for run in record["runs"]], record["metrics"], record["pairs"]
        table = _table(folder / "matrices.parquet", ["metric", "run_a", "run_b", "mean", "low", "high", "n"])
    if table is None:
        raise ConfigError(f"comparison: {address!r} has no matrices.parquet; run jobs/compare.py again")
    return Comparison(folder.address, record, table)


def _json(folder: Folder, name: str, what: str, job: str) -> dict[str, Any]:
    try:
        with reading(folder / name):
            document = json.loads((folder / name).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{folder.address!r} is not {what}: it has no {name}; {job} writes one, last") from error
    if not isinstance(document, dict):
        raise StorageError(f"{(folder / name).address!r} is not a JSON object")
    return document


def _text(place: Folder) -> str:
    try:
        with reading(place):
            return place.read_bytes().decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _table(place: Folder, columns: list[str] | None = None) -> pa.Table | None:
    try:
        with reading(place):
            data = place.read_bytes()
        return pq.read_table(io.BytesIO(data), columns=columns)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def _understood(key: str, address: str) -> Iterator[None]:
    """Say which input it was that is not as this version writes it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AssertionError, OSError, pa.ArrowException) as error:  # OSError of Arrow
        raise StorageError(
            f"{key}: {address!r} is not as this version writes it ({type(error).__name__}: {error})"
        ) from error


def column(table: pa.Table, name: str) -> np.ndarray:
    """Return a column as float64, NaN where it is null."""
    return table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
