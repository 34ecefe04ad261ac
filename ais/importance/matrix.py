"""A human similarity matrix from a file, with the order of its images if the file says it."""

from __future__ import annotations

import csv
import io

import numpy as np

from ais.errors import SimilarityError
from ais.storage import Storage, reading

_NPY, _ZIP = b"\x93NUMPY", b"PK"


def read_matrix(address: str, storage: Storage) -> tuple[np.ndarray, list[str] | None]:
    """Read a matrix; whether it can be used is for `ais.importance.similarity.check_human_matrix` to say.

    Args:
        address: of a ``.npy``; of an ``.npz`` with one matrix, and optionally the image addresses as ``images``; or of
            a ``.csv``, either numbers only or with the image addresses as header and as first column.
        storage: how to reach it.

    Returns:
        the matrix, and the addresses of its images in order, ``None`` where the file has none.

    Raises:
        SimilarityError: there is no such file, it is of another kind or damaged, holds no numbers, or header and first
            column disagree.
        StorageError: it cannot be read.
    """
    place = storage.open(address)
    try:
        with reading(place):
            data = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SimilarityError(
            f"matrix {address!r} does not exist; "
            "give a .npy, .npz or .csv file (jobs/convert.py makes one of the Peterson sets)"
        ) from error
    try:
        if address.endswith(".npy"):
            if not data.startswith(_NPY):
                raise ValueError("it is no array of NumPy")
            return _numbers(address, np.load(io.BytesIO(data), allow_pickle=False)), None
        if address.endswith(".npz"):
            return _from_npz(address, data)
        if address.endswith(".csv"):
            return _from_csv(address, data.decode("utf-8-sig"))
    except SimilarityError:
        raise
    except Exception as error:  # whatever the bytes of another file, or of a damaged one, lead to
        raise SimilarityError(f"matrix {address!r} cannot be read: {error}; save it again, numbers only") from error
    raise SimilarityError(f"matrix {address!r} is no .npy, .npz or .csv file; save it as one")


def _numbers(address: str, matrix: np.ndarray) -> np.ndarray:
    if matrix.dtype.kind not in "biuf":
        raise SimilarityError(f"matrix {address!r} holds {matrix.dtype}, not numbers; save it again, numbers only")
    return matrix


def _from_npz(address: str, data: bytes) -> tuple[np.ndarray, list[str] | None]:
    if not data.startswith(_ZIP):
        raise ValueError("it is no archive of arrays")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        matrices = [name for name in arrays.files if arrays[name].ndim == 2]
        if len(matrices) != 1:
            raise SimilarityError(
                f"matrix {address!r} must hold one matrix; it holds {', '.join(arrays.files)}; leave the others out"
            )
        images = [str(name) for name in arrays["images"]] if "images" in arrays.files else None
        return _numbers(address, arrays[matrices[0]]), images


def _from_csv(address: str, text: str) -> tuple[np.ndarray, list[str] | None]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if len({len(row) for row in rows}) != 1:
        raise SimilarityError(
            f"matrix {address!r} has rows of different lengths; write one row and one column for each image"
        )
    if _is_number(rows[0][-1]):
        return np.array(rows, dtype=np.float64), None
    images, labels = rows[0][1:], [row[0] for row in rows[1:]]
    if images != labels:
        at = next((i for i, pair in enumerate(zip(images, labels, strict=False)) if pair[0] != pair[1]), len(labels))
        raise SimilarityError(
            f"matrix {address!r}: header and first column name other images from number {at + 1} on; "
            "bring both into one order"
        )
    return np.array([row[1:] for row in rows[1:]], dtype=np.float64), images


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
