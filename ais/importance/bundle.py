"""An AIS vector on disk: ``importance.parquet``, a row per feature map, and ``importance.json``, what it belongs to.

Individual similarity AIS also has ``importance_by_image.parquet``: ``uri`` and ``ais``, a list of C numbers, per image.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ais.errors import ImportanceError
from ais.storage import Folder, Storage, reading

FORMAT = 1
TABLE_FILE = "importance.parquet"
RECORD_FILE = "importance.json"
BY_IMAGE_FILE = "importance_by_image.parquet"


@dataclass(frozen=True)
class ImportanceRecord:
    """What an AIS vector belongs to.

    Args:
        objective: ``"prediction"``, ``"error"`` or ``"similarity"``.
        backbone: name in the registry.
        weights_fingerprint: of the backbone's weights.
        layer: whose maps were ablated.
        preprocessing: mode under which images were prepared.
        head: SHA-256 of the head's weights; ``None`` for ``similarity``, which needs no head.
    """

    objective: str
    backbone: str
    weights_fingerprint: str
    layer: str
    preprocessing: str
    head: str | None

    def check_belongs(self, used: ImportanceRecord) -> None:
        """Refuse to use the vector elsewhere than it was made.

        Raises:
            ImportanceError: names what differs, both ways.
        """
        for what in ("backbone", "weights_fingerprint", "layer", "preprocessing", "head"):
            made, wanted = getattr(self, what), getattr(used, what)
            if made != wanted and not (what == "head" and made is None):
                raise ImportanceError(
                    f"the importance was made with {what.replace('_', ' ')} {made!r}, not {wanted!r}; run "
                    "jobs/importance.py for this one"
                )


def save_importance(
    address: str,
    importance: pa.Table,
    record: ImportanceRecord,
    details: dict[str, Any],
    storage: Storage,
    by_image: pa.Table | None = None,
) -> None:
    """Write a bundle; ``importance.json`` last.

    Args:
        address: of the folder.
        importance: with the columns ``map`` (0 to C - 1, in order) and ``ais``, and any others.
        record: what it belongs to.
        details: further entries of ``importance.json`` for people to read.
        storage: how to reach the folder.
        by_image: of `ais.importance.ranking.by_image_table`, for individual AIS.
    """
    folder = storage.open(address)
    _replace_table(folder / BY_IMAGE_FILE, by_image)
    data = io.BytesIO()
    pq.write_table(importance, data, compression="zstd")
    (folder / TABLE_FILE).write_bytes(data.getvalue())
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    document = {"format": FORMAT, **asdict(record), "sha256": digest, **details}
    (folder / RECORD_FILE).write_text(json.dumps(document, indent=2) + "\n")


def _replace_table(place: Folder, table: pa.Table | None) -> None:
    if table is not None:
        data = io.BytesIO()
        pq.write_table(table, data, compression="zstd")
        place.write_bytes(data.getvalue())
    elif place.exists():
        place.remove()  # of an earlier bundle, which is being replaced


def load_importance_by_image(address: str, storage: Storage) -> tuple[list[str], np.ndarray]:
    """Read the individual AIS of a bundle: addresses of N images, and ``(N, C)`` float64.

    Raises:
        ImportanceError: the bundle has none, or it is damaged.
    """
    place = storage.open(address) / BY_IMAGE_FILE
    try:
        table = pq.read_table(io.BytesIO(place.read_bytes()), columns=["uri", "ais"])
        ais = table["ais"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImportanceError(
            f"{address!r} has no AIS by image; jobs/importance.py objective=similarity level=individual writes it"
        ) from error
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise ImportanceError(
            f"{BY_IMAGE_FILE} in {address!r} cannot be used: {error}; run jobs/importance.py again"
        ) from error
    return table["uri"].to_pylist(), ais


def load_importance(address: str, storage: Storage) -> tuple[np.ndarray, ImportanceRecord, str]:
    """Read a bundle.

    Returns:
        the AIS ``(C,)`` float64, what it belongs to, and the SHA-256 of its table.

    Raises:
        ImportanceError: there is none, or it is damaged.
        StorageError: it cannot be read.
    """
    folder = storage.open(address)
    try:
        with reading(folder):
            said, data = (folder / RECORD_FILE).read_bytes(), (folder / TABLE_FILE).read_bytes()
        document = json.loads(said)
        record = ImportanceRecord(**{name: document[name] for name in ImportanceRecord.__dataclass_fields__})
        digest = hashlib.sha256(data).hexdigest()
        if document["format"] != FORMAT or document["sha256"] != digest:
            raise ImportanceError(
                f"{address!r} is of another format, or {TABLE_FILE} is not the one of its record; "
                "run jobs/importance.py again"
            )
        table = pq.read_table(io.BytesIO(data), columns=["map", "ais"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImportanceError(f"{address!r} is not an importance bundle; jobs/importance.py writes one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ImportanceError(
            f"{address!r} is not a usable importance bundle: {error}; run jobs/importance.py again"
        ) from error
    ais = table["ais"].to_numpy()
    if not np.array_equal(table["map"].to_numpy(), np.arange(len(ais))) or not np.isfinite(ais).all():
        raise ImportanceError(
            f"{TABLE_FILE} in {address!r} must have the maps 0 to C - 1 in order, and finite values; "
            "run jobs/importance.py again"
        )
    return ais, record, digest
