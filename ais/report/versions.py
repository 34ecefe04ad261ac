"""Which version of an image a run is of, of the few images that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ais.errors import RunError
from ais.listing import ListedImage
from ais.report.scores import read_rows
from ais.storage import Folder, explain, scheme

_READERS = 16
_COLUMNS = ("image_id", "size", "mtime")


class Versions:
    """The images of a run as they were listed; only the row groups of the manifest that they are in are fetched.

    Args:
        manifest: folder of ``part-*.parquet``, with the ids 0, 1, 2, … in order, as many in each part but the last.
    """

    def __init__(self, manifest: Folder) -> None:
        self._manifest = manifest
        self._parts: list[Folder] | None = None
        self._length = 0

    def __call__(self, results: pa.Table) -> list[ListedImage]:
        """Return what was listed of each row of ``image_id, uri, etag``.

        An etag of S3 says it all. Of others, size and time of change are looked up.

        Raises:
            RunError: the manifest cannot be read.
        """
        ids, uris, etags = (results[name].to_pylist() for name in ("image_id", "uri", "etag"))
        open_rows = [row for row, uri in enumerate(uris) if etags[row] is None or scheme(uri) not in ("s3", "s3a")]
        listed = [ListedImage(uri, etag=etag) for uri, etag in zip(uris, etags, strict=True)]
        for row, (size, mtime) in zip(open_rows, self._look_up([ids[row] for row in open_rows]), strict=True):
            listed[row] = ListedImage(uris[row], size, etags[row], mtime)
        return listed

    def _look_up(self, ids: Sequence[int]) -> list[tuple[int | None, float | None]]:
        if not ids:
            return []
        try:
            if self._parts is None:
                self._parts = self._manifest.files("part-*.parquet")
                with self._parts[0].filesystem.open(self._parts[0].path, "rb") as file:
                    self._length = pq.read_metadata(file).num_rows
            part_of, row_of = np.divmod(np.asarray(ids), self._length)
            found: dict[int, tuple[int | None, float | None]] = {}
            with ThreadPoolExecutor(_READERS) as pool:
                numbers = np.unique(part_of)
                parts = [self._parts[number] for number in numbers]
                rows = [row_of[part_of == number] for number in numbers]
                for table in pool.map(read_rows, parts, rows, repeat(_COLUMNS)):
                    found |= {row["image_id"]: (row["size"], row["mtime"]) for row in table.to_pylist()}
            return [found[image_id] for image_id in ids]
        except (pa.ArrowException, OSError, LookupError) as error:
            raise RunError(
                f"{self._manifest.address!r} cannot be read: {explain(error)}; it says which versions of its images "
                "the run is of: bring it back"
            ) from error
