"""Listings: a folder, a glob or a list of addresses, as a stream of images in an order that is always the same.

A collection may have a million images in one folder, so nothing here holds all of them: object stores are asked page by
page, folders of this machine give up their names alone (those of one folder at a time are sorted), lists are read in
batches. Files come in the order of their addresses as object stores sort them, on a disk as well.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from ais.errors import StorageError
from ais.secrets import redact, refuse_secrets
from ais.storage import Folder, Storage, explain, is_local, scheme, tried

_IMAGES = "jpg jpeg jpe jfif mpo png webp avif gif bmp dib tif tiff ppm pgm pbm pnm"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _IMAGES.split())
_LIST_SUFFIXES = (".csv", ".parquet")
_LIST_TYPES = {"uri": pa.string(), "size": pa.int64(), "etag": pa.string(), "mtime": pa.float64()}
_LIST_ROWS = 2**16
_LIST_BLOCK_BYTES = 2**22
_PAGE = 1000  # what S3 gives at most
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One image as a listing found it.

    Args:
        uri: address; an absolute path for local files.
        size: in bytes, if the listing says.
        etag: of an object store, if the listing says.
        mtime: seconds since 1970, if the listing says.
    """

    uri: str
    size: int | None = None
    etag: str | None = None
    mtime: float | None = None

    @property
    def version(self) -> str:
        """What tells one content at this address from another: the etag, or size and time of change."""
        return self.etag or f"{self.size}-{self.mtime}"


@dataclass
class Listing:
    """Images found at an address; iterate once. ``ignored`` then counts files left out, by suffix."""

    images: Iterable[ListedImage]
    ignored: Counter[str]

    def __iter__(self) -> Iterator[ListedImage]:
        return iter(self.images)


def list_images(address: str, storage: Storage) -> Listing:
    """List a folder (walked through), a glob, or the ``uri`` column of a CSV or Parquet file.

    In a folder, files are images by their suffix, and other files are counted in ``ignored``; a glob or a list is
    taken as it is. Relative addresses in a list start at the folder of the list.

    Raises:
        StorageError: nothing is there, or a list has no ``uri`` column.
    """
    place = storage.open(address)
    ignored: Counter[str] = Counter()
    try:
        if address.lower().endswith(_LIST_SUFFIXES) and tried(lambda: place.filesystem.isfile(place.path)):
            return Listing(_listed(place), ignored)
        if tried(lambda: place.filesystem.isdir(place.path)):
            return Listing(_walked(place, ignored), ignored)
        if tried(lambda: place.filesystem.isfile(place.path)):
            return Listing([_listed_image(place, tried(lambda: place.filesystem.info(place.path)))], ignored)
        if _MAGIC.search(address):
            return Listing(_globbed(place), ignored)
    except StorageError:
        raise
    except Exception as error:  # every filesystem raises its own kinds
        raise StorageError(
            f"images {address!r} cannot be listed: {explain(error)}; check the address and the access to it"
        ) from error
    raise StorageError(f"images {address!r} does not exist: give a folder, a glob, or a CSV or Parquet list")


def look_up(address: str, storage: Storage) -> ListedImage:
    """Ask for size and version of one image, in one request; an image that cannot be found has neither."""
    try:
        place = storage.open(address)
        found = _listed_image(place, tried(lambda: place.filesystem.info(place.path)))
        return replace(found, uri=address)
    except Exception:  # what is wrong is said when it is read
        return ListedImage(address)


def _listed_image(place: Folder, info: dict[str, Any]) -> ListedImage:
    etag = info.get("ETag") or info.get("etag")
    changed = info.get("LastModified") or info.get("mtime") or info.get("updated")
    mtime = changed.timestamp() if isinstance(changed, datetime) else changed
    return ListedImage(
        uri=_as_text(Folder(place.filesystem, str(info["name"])).address),
        size=info.get("size"),
        etag=_unquoted(etag),
        mtime=float(mtime) if isinstance(mtime, int | float) else None,
    )


def _as_text(address: str) -> str:
    """File names that are not UTF-8 reach Python as lone surrogates, which no Arrow string can hold.

    Escaped, they name no file, and become a row in errors.
    """
    return address.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file as a listing meets it; ``image`` asks for the rest, only where it is wanted."""

    path: str  # relative to the folder that is listed
    image: Callable[[], ListedImage]


def _walked(place: Folder, ignored: Counter[str]) -> Iterator[ListedImage]:
    return _images(_entries(place), ignored)


def _walked_reference(place: Folder, ignored: Counter[str]) -> Iterator[ListedImage]:
    """Slow, obvious twin of `_walked`, for every filesystem."""
    return _images(_entries_reference(place), ignored)


def _images(entries: Iterable[_Entry], ignored: Counter[str]) -> Iterator[ListedImage]:
    """Leave out hidden files and folders, and count files that are no images by their suffix."""
    for entry in entries:
        folder, _, name = entry.path.rpartition("/")
        if folder and any(part.startswith(".") for part in folder.split("/")):
            continue
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in IMAGE_SUFFIXES and not name.startswith("."):
            yield entry.image()
        else:
            ignored[suffix or "(no suffix)"] += 1


def _globbed(place: Folder) -> Iterator[ListedImage]:
    fixed = _MAGIC.split(place.path)[0]
    root = posixpath.dirname(fixed)
    pattern = place.path[len(root) :].lstrip("/")
    try:
        matches = re.compile(glob_translate(pattern)).match
    except ValueError as error:
        raise StorageError(
            f"images {place.address!r} is no pattern: {error}; put ** between slashes, as in photos/**/*.jpg"
        ) from error
    depth = None if "**" in pattern else pattern.count("/")
    start = posixpath.basename(fixed)
    if not place.on_s3 and not tried(lambda: place.filesystem.isdir(root or "/")):
        return  # as for every pattern that nothing matches
    for entry in _entries(Folder(place.filesystem, root or "/"), depth, start):
        if matches(entry.path):
            yield entry.image()


def _globbed_reference(place: Folder) -> Iterator[ListedImage]:
    """Slow, obvious twin of `_globbed`: fsspec's own glob, sorted."""
    for _, info in sorted(place.filesystem.glob(place.path, detail=True).items()):
        if info["type"] == "file" and not str(info["name"]).endswith("/"):
            yield _listed_image(place, info)


def _entries(place: Folder, depth: int | None = None, start: str = "") -> Iterator[_Entry]:
    """Every file below a folder.

    Args:
        place: the folder.
        depth: of folders below it that are entered; ``None`` for all. Deeper files may come all the same.
        start: of the paths of all files that are wanted. Others may come all the same.
    """
    if place.on_s3:
        return _entries_on_s3(place, start)
    if place.local:
        return _entries_on_disk(place, depth)
    return _entries_reference(place, depth)


def _entries_on_s3(place: Folder, start: str) -> Iterator[_Entry]:
    """Page by page, one after the other, a thousand objects each, in S3's own order."""
    s3: Any = place.filesystem
    bucket, key, _ = s3.split_path(place.path)
    folder = f"{key.rstrip('/')}/" if key else ""
    query = {"Bucket": bucket, "Prefix": folder + start, "MaxKeys": _PAGE, **s3.req_kw}
    while True:
        page = _paged(place, lambda: s3.call_s3("list_objects_v2", **query))
        for found in page.get("Contents", ()):
            if not found["Key"].endswith("/"):  # the marker of a folder
                yield _Entry(found["Key"][len(folder) :], partial(_s3_image, place, bucket, found))
        if not page.get("IsTruncated"):
            return
        query["ContinuationToken"] = page["NextContinuationToken"]


def _paged(place: Folder, page: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return tried(page)
    except Exception as error:  # s3fs raises many kinds
        raise StorageError(
            f"{place.address!r} cannot be listed: {explain(error)}; check the address and the access to it"
        ) from error


def _s3_image(place: Folder, bucket: str, found: dict[str, Any]) -> ListedImage:
    return _listed_image(place, {**found, "name": f"{bucket}/{found['Key']}", "size": found["Size"]})


def _entries_on_disk(place: Folder, depth: int | None) -> Iterator[_Entry]:
    """Folder by folder; of the one that is read, and of those above it, names are held, and nothing else.

    Links to files are followed, links to folders are not, which might lead around in circles.
    """
    above = [_names(place, "")]
    while above:
        path = next(above[-1], None)
        if path is None:
            above.pop()
        elif path.endswith("/"):
            if depth is None or path.count("/") <= depth:
                above.append(_names(place, path))
        else:
            yield _Entry(path, partial(_disk_image, place, path))


def _names(place: Folder, folder: str) -> Iterator[str]:
    """Paths in one folder, sorted; folders end in a slash, which sorts them as object stores do."""
    try:
        with os.scandir(posixpath.join(place.path, folder)) as entries:
            found = [
                f"{folder}{entry.name}/" if entry.is_dir(follow_symlinks=False) else folder + entry.name
                for entry in entries
            ]
    except OSError as error:
        address = _as_text(posixpath.join(place.address, folder).rstrip("/"))
        raise StorageError(
            f"{address!r} cannot be walked: {explain(error)}; check the address and its permissions"
        ) from error
    found.sort()
    found.reverse()
    while found:
        yield found.pop()  # what was given out is not held any more


def _disk_image(place: Folder, path: str) -> ListedImage:
    full = posixpath.join(place.path, path)
    try:
        status = os.stat(full)
    except OSError:  # a link to nowhere, or gone by now: said when it is read
        return ListedImage(_as_text(full))
    return ListedImage(_as_text(full), status.st_size, None, status.st_mtime)


def _entries_reference(place: Folder, depth: int | None = None) -> Iterator[_Entry]:
    """For every filesystem, through its ``ls``: whole folders at a time."""
    # fsspec's own walk leaves out folders below the first that cannot be read, whatever it is told.
    above = [iter(_ls(place, place.path))]
    while above:
        info = next(above[-1], None)
        if info is None:
            above.pop()
            continue
        path = str(info["name"]).rstrip("/")
        relative = path[len(place.path) :].lstrip("/")
        if not relative or (info["type"] != "directory" and str(info["name"]).endswith("/")):
            continue  # an object store's marker of a folder
        if info["type"] != "directory":
            yield _Entry(relative, partial(_listed_image, place, info))
        elif depth is None or relative.count("/") < depth:
            above.append(iter(_ls(place, path)))


def _ls(place: Folder, path: str) -> list[dict[str, Any]]:
    try:
        entries = tried(lambda: place.filesystem.ls(path, detail=True))
    except Exception as error:  # every filesystem raises its own kinds
        address = Folder(place.filesystem, path).address
        raise StorageError(
            f"{address!r} cannot be walked: {explain(error)}; check the address and its permissions"
        ) from error
    return sorted(entries, key=_sorted_as)


def _sorted_as(entry: dict[str, Any]) -> str:
    name = str(entry["name"]).rstrip("/")
    return f"{name}/" if entry["type"] == "directory" else name


def _unquoted(etag: Any) -> str | None:
    """An etag without the quotation marks that S3 and its tools print around it; ``None`` of nothing."""
    return str(etag).strip('"') if etag else None


def _listed(place: Folder) -> Iterator[ListedImage]:
    row = 0
    for batch in _list_batches(place):
        for values in batch.to_pylist():
            row += 1
            uri = values.pop("uri")
            if not uri:
                raise StorageError(f"{place.address!r} has a row with an empty 'uri': fill in row {row}, or delete it")
            if "etag" in values:
                values["etag"] = _unquoted(values["etag"])
            yield ListedImage(uri=_listed_address(place, uri, row), **values)


def _list_batches(place: Folder) -> Iterator[pa.RecordBatch]:
    is_csv = place.path.lower().endswith(".csv")
    try:
        with _opened(place) as file:
            if is_csv:
                columns = _csv_reader(file, {}).schema.names
                given = [name for name in _LIST_TYPES if name in columns]
            else:
                parquet = pq.ParquetFile(file)
                columns = parquet.schema_arrow.names
                given = [name for name in _LIST_TYPES if name in columns]
            if "uri" not in given:
                raise StorageError(
                    f"{place.address!r} has no column 'uri' with the addresses of images; it has {', '.join(columns)}"
                )
            schema = pa.schema([(name, _LIST_TYPES[name]) for name in given])
            if not is_csv:
                for batch in parquet.iter_batches(_LIST_ROWS, columns=given):
                    yield from pa.table(batch).select(given).cast(schema).to_batches()
                return
        with _opened(place) as file:
            for batch in _csv_reader(file, {"include_columns": given}):
                yield from pa.table(batch).cast(schema).to_batches()
    except StorageError:
        raise
    except Exception as error:  # of Arrow, of every filesystem, and of names that are not UTF-8
        raise StorageError(
            f"{place.address!r} cannot be read as a list of images: {explain(error)}; "
            "save it as CSV with a header, in UTF-8, or as Parquet"
        ) from error


def _csv_reader(file: Any, columns: dict[str, Any]) -> pa.csv.CSVStreamingReader:
    return pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(block_size=_LIST_BLOCK_BYTES),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=_LIST_TYPES, **columns),
    )


def _opened(place: Folder) -> BinaryIO:
    if place.local:
        return open(place.path, "rb")
    file: BinaryIO = tried(lambda: place.filesystem.open(place.path, "rb"))
    return file


def _listed_address(place: Folder, uri: str, row: int) -> str:
    """The full address of one row.

    A list may come from elsewhere. So a relative address stays below the folder of the list, a list on a server names
    no files of this machine, and no address carries a secret, which would be written into every output.
    """
    try:
        refuse_secrets(uri)
    except ValueError as error:
        raise StorageError(f"{place.address!r}, row {row}: {error}; mend the row, or delete it") from None
    if re.match("[a-zA-Z][a-zA-Z0-9+.-]*://", uri) or posixpath.isabs(uri):
        if is_local(uri) and not place.local:
            raise StorageError(
                f"{place.address!r}, row {row}: {uri!r} is a file of this machine, and the list is not; copy the list"
                " here if that is meant"
            )
        return uri
    folder = posixpath.dirname(place.path)
    joined = posixpath.join(folder, uri)
    # Servers of the web resolve what is escaped; everywhere else an address is taken literally.
    meant = unquote(joined) if scheme(place.address) in ("http", "https") else joined
    if not posixpath.normpath(meant).startswith(posixpath.normpath(folder).rstrip("/") + "/"):
        raise StorageError(
            f"{place.address!r}, row {row}: {redact(uri)!r} leads out of the folder of the list; write the whole"
            " address"
        )
    return Folder(place.filesystem, joined).address
