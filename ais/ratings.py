"""The table of ratings: which images people rated, and how."""

from __future__ import annotations

import difflib
import hashlib
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ais.config import OptionalRatingsConfig, RatingsConfig
from ais.errors import RatingsError
from ais.storage import Storage, absolute, explain, is_local, reading, scheme

MIN_RATED = 10
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_NO_SCORE = frozenset(("", "na", "n/a", "#n/a", "null", "none", "-"))
_ROWS_SHOWN = 5


@dataclass(frozen=True)
class Ratings:
    """Rated images, each once, in the order of the table.

    Args:
        images: ``(n,)`` str, as the table writes them.
        addresses: ``(n,)`` str, full addresses; absolute paths for local files.
        scores: ``(n,)`` float64, finite and not all the same.
        splits: ``(n,)`` of ``"train"``, ``"validation"`` and ``"test"``, or ``None`` where the table has no splits.
        rows: of the table.
        skipped: rows without a finite score that were left out.
        averaged: rows beyond the first of their image, averaged into it.
    """

    images: NDArray[np.str_]
    addresses: NDArray[np.str_]
    scores: NDArray[np.float64]
    splits: NDArray[np.str_] | None
    rows: int
    skipped: int
    averaged: int

    def __len__(self) -> int:
        return len(self.scores)


RatingsT = TypeVar("RatingsT", RatingsConfig, OptionalRatingsConfig)


def with_absolute_addresses(config: RatingsT) -> RatingsT:
    """The same, with local paths absolute: a saved configuration means the same files wherever it is read."""
    given = {"path": config.path, "root": config.root}
    return config.model_copy(update={key: absolute(address) for key, address in given.items() if address is not None})


def read_ratings(config: RatingsConfig, storage: Storage) -> Ratings:
    """Read and check a table of ratings, CSV (with a header, UTF-8) or Parquet.

    Image addresses are full addresses (``s3://…``), absolute paths, or relative to ``root`` (the folder of the table
    where none is given). A relative address that leads out of the root by ``..`` is refused; so is an absolute one
    outside of a root that was given, since giving a root says where the images are, and a path of this machine in a
    table that is elsewhere. ``allow_outside_root`` accepts all three. Paths are compared as text: symbolic links are
    not followed.

    Args:
        config: which table, its columns, and what to do about gaps and duplicates.
        storage: how to reach it.

    Raises:
        RatingsError: the table cannot be read or used; names rows (counted from 1 after the header), column, value and
            the way out.
    """
    table = _read_table(config, storage)
    has_splits = config.split_column in table.column_names
    if table.num_rows == 0:
        raise RatingsError(f"{config.path!r} has a header and no rows; at least {MIN_RATED} rated images are needed")
    images = _texts(table, config.image_column)
    empty = [not image.strip() for image in images]
    _refuse(config, config.image_column, images, empty, "no address; name an image, or delete the row")
    scores = _scores(table, config)
    kept = np.isfinite(scores)
    if config.missing == "error":
        shown = [str(value) for value in table[config.score_column].to_pylist()]
        _refuse(config, config.score_column, shown, ~kept, "not finite; ratings.missing=skip leaves such rows out")
    splits = _splits(table, config) if has_splits else None
    addresses = _addresses(images, config, storage)

    rows = np.flatnonzero(kept)
    first, group = _first_of_each(addresses[rows])
    if config.duplicates == "error":
        repeated = np.zeros(len(images), bool)
        repeated[np.delete(rows, first)] = True
        _refuse(
            config,
            config.image_column,
            images,
            repeated,
            "rated before in this table; ratings.duplicates=mean averages the ratings of one image",
        )
    if splits is not None:
        divided = np.zeros(len(images), bool)
        divided[rows] = splits[rows] != splits[rows[first]][group]
        _refuse(config, config.split_column, splits.tolist(), divided, "in another split before; put an image in one")
    means = np.bincount(group, weights=scores[rows]) / np.maximum(np.bincount(group), 1)
    chosen = rows[first]
    ratings = Ratings(
        images=np.array(images)[chosen],
        addresses=addresses[chosen],
        scores=means,
        splits=None if splits is None else splits[chosen],
        rows=table.num_rows,
        skipped=int((~kept).sum()),
        averaged=len(rows) - len(first),
    )
    _check_usable(ratings, config)
    return ratings


def ratings_fingerprint(ratings: Ratings) -> str:
    """SHA-256 of addresses, scores and splits, in their order."""
    digest = hashlib.sha256()
    for column in (ratings.addresses, ratings.scores, ratings.splits):
        digest.update(b"\0" if column is None else "\n".join(map(repr, column.tolist())).encode())
    return digest.hexdigest()


def held_out_images(head: str, storage: Storage) -> list[str]:
    """Return the images of a head's test split, as its table of ratings wrote them.

    Args:
        head: address of the head bundle.
        storage: how to reach it.

    Raises:
        RatingsError: the bundle does not say, or not in a way that can be read.
        StorageError: it cannot be read.
    """
    place = storage.open(head) / "predictions.parquet"
    try:
        with reading(place):
            data = pa.BufferReader(place.read_bytes())
        return [str(image) for image in pq.read_table(data, columns=["image"])["image"].to_pylist()]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RatingsError(
            f"head {head!r} does not say which images it was not trained on (it has no predictions.parquet): give "
            "ratings of such images and held_out=false"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise RatingsError(
            f"{place.address!r} does not name the images of a test split: {explain(error)}; copy the head's bundle "
            "whole, or train it again with jobs/train.py"
        ) from error


def _read_table(config: RatingsConfig, storage: Storage) -> pa.Table:
    used = [config.image_column, config.score_column, config.split_column]
    try:
        place = storage.open(config.path)
        with reading(place):
            data = pa.BufferReader(place.read_bytes())
        if config.path.lower().endswith(".parquet"):
            table = pq.read_table(data)
        else:
            # Scores as text: Arrow infers a type from the first megabyte alone.
            table = pa.csv.read_csv(
                data,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(used, pa.string())),
            )
        names = table.column_names
    except OSError as error:
        raise RatingsError(
            f"ratings.path: {config.path!r} cannot be read: {type(error).__name__}: {error}; "
            "check the address and the access to it"
        ) from error
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of the header
        raise RatingsError(
            f"{config.path!r} cannot be read as a table of ratings: {error}; "
            "save it as CSV with a header, in UTF-8, or as Parquet"
        ) from error
    for key, column in (("image_column", config.image_column), ("score_column", config.score_column)):
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f"; did you mean ratings.{key}={near[0]}?" if near else f"; set ratings.{key}"
            if len(names) == 1 and set(names[0]) & set(";\t|"):
                hint = "; separate the columns by commas"
            raise RatingsError(f"{config.path!r} has no column {column!r}, it has {', '.join(map(repr, names))}{hint}")
    for column in used:
        if names.count(column) > 1:
            raise RatingsError(f"{config.path!r} has {names.count(column)} columns {column!r}; rename all but one")
    return table.select([column for column in used if column in names])


def _texts(table: pa.Table, column: str) -> list[str]:
    return ["" if value is None else str(value) for value in table[column].to_pylist()]


def _scores(table: pa.Table, config: RatingsConfig) -> NDArray[np.float64]:
    """The ``(rows,)`` scores, NaN where there is none."""
    values = table[config.score_column].to_pylist()
    scores = [_number(value) for value in values]
    _refuse(
        config,
        config.score_column,
        [str(value) for value in values],
        [score is None for score in scores],
        "not a number; write scores like 3.5",
    )
    return np.array(scores, np.float64)


def _number(value: object) -> float | None:
    """A score as a number, NaN for a gap, ``None`` for anything else."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NO_SCORE):
        return float("nan")
    # Python would also read True as 1 and 1_000 as 1000.
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _splits(table: pa.Table, config: RatingsConfig) -> NDArray[np.str_]:
    words = _texts(table, config.split_column)
    splits = [_SPLITS.get(word.strip().lower(), "") for word in words]
    way_out = "no split; write train, validation (or val) or test, or set ratings.split_column to another name"
    _refuse(config, config.split_column, words, [not split for split in splits], way_out)
    return np.array(splits)


class _Root(NamedTuple):
    address: str
    path: str
    given: bool

    def contains(self, path: str) -> bool:
        """Whether a path lies inside, as text."""
        return _as_meant(path).startswith(_as_meant(self.path).rstrip("/") + "/")


def _as_meant(path: str) -> str:
    """A path without ``..``, and on the web, whose servers resolve what is escaped, without escapes."""
    return posixpath.normpath(unquote(path) if scheme(path) in ("http", "https") else path)


def _addresses(images: Sequence[str], config: RatingsConfig, storage: Storage) -> NDArray[np.str_]:
    """Resolve the ``(rows,)`` addresses."""
    folder = posixpath.dirname(storage.open(config.path).address)
    place = storage.open(config.root or folder)
    root = _Root(place.address.rstrip("/"), place.path, config.root is not None)
    addresses, outside = [], []
    for image in images:
        is_full = scheme(image) != "file" or image.startswith(("/", "file:", "local:", "~/"))
        target = storage.open(image if is_full else f"{root.address}/{image}")
        addresses.append(target.address)
        inside = scheme(target.address) == scheme(root.address) and root.contains(target.path)
        # A table on a server has no say over the files of this machine.
        foreign = is_local(target.address) and not is_local(config.path) and not (root.given and inside)
        outside.append(((root.given or not is_full) and not inside) or foreign)
    if not config.allow_outside_root:
        reason = f"outside of {root.address!r}; ratings.allow_outside_root=true accepts it"
        _refuse(config, config.image_column, images, outside, reason)
    return np.array(addresses)


def _first_of_each(addresses: NDArray[np.str_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row of each distinct address's first occurrence, in order of the rows, and each row's position among them."""
    _, first, group = np.unique(addresses, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[group]


def _refuse(
    config: RatingsConfig, column: str, values: Sequence[str], wrong: Sequence[bool] | NDArray[np.bool_], reason: str
) -> None:
    """Raise an error that names the first rows in which a value is wrong, if any is."""
    rows = np.flatnonzero(wrong)
    if len(rows) == 0:
        return
    shown = ", ".join(f"row {row + 1} has {values[row]!r}" for row in rows[:_ROWS_SHOWN])
    more = f" and {len(rows) - _ROWS_SHOWN:,} more rows" if len(rows) > _ROWS_SHOWN else ""
    raise RatingsError(f"{config.path!r}, column {column!r}: {shown}{more}: {reason} (the row after the header is 1)")


def _check_usable(ratings: Ratings, config: RatingsConfig) -> None:
    if len(ratings) < MIN_RATED:
        left_out = f" ({ratings.skipped} of {ratings.rows} rows have no finite score)" if ratings.skipped else ""
        raise RatingsError(
            f"{config.path!r} rates {len(ratings)} images{left_out}; at least {MIN_RATED} are needed to fit a head, and"
            " hundreds to fit a good one"
        )
    if np.ptp(ratings.scores) == 0:
        raise RatingsError(
            f"{config.path!r}, column {config.score_column!r}: all {len(ratings)} images have the score"
            f" {ratings.scores[0]:g}; there is nothing to learn from a constant; set another ratings.score_column"
        )
    if ratings.splits is not None:
        found = Counter(ratings.splits.tolist())
        for split in ("train", "test"):
            if not found[split]:
                raise RatingsError(
                    f"{config.path!r}, column {config.split_column!r}: no row says {split!r}, found"
                    f" {', '.join(f'{count} {word}' for word, count in found.items())}; add some, or set"
                    " ratings.split_column to a name that the table does not have to split at random"
                )
