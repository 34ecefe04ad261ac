"""Published data sets, as they lie on disk, made into a table of ratings or a human similarity matrix.

- ``ava``: Murray, Marchesotti and Perronnin, CVPR 2012; votes from 1 to 10, with a published split.
- ``koniq10k``: Hosu, Lin, Sziranyi and Saupe, IEEE TIP 2020; mean opinion scores, with a published split.
- ``aigciqa2023``: Wang et al., arXiv 2307.00211; mean opinion scores of three aspects, no split.
- ``peterson``: Peterson, Abbott and Griffiths, Cognitive Science 2018; similarities of 120 images a category.

What is known of each layout is said, with its source, at its reader. Nothing is downloaded and no image is read: names
and numbers only. A line that is not as published is refused with its file, number and value.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io

from ais.config import ConvertConfig
from ais.errors import ConfigError, DatasetError
from ais.importance.matrix import read_matrix
from ais.importance.similarity import check_human_matrix
from ais.listing import list_images
from ais.storage import Folder, Storage, absolute, reading

_MAX_BYTES = 256 * 2**20  # the largest of these files, AVA.txt, has 13 MB
_MAX_NUMBERS = 16 * 2**20  # of a MATLAB variable: 4096 x 4096
_PICTURE = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)
_SHOWN = 40  # characters of a bad line
_MOST_DIGITS = 15


@dataclass(frozen=True)
class Rated:
    """Ratings as a data set publishes them.

    Args:
        source: the file they come from.
        names: ``(n,)`` file names of the images, each once.
        scores: ``(n,)`` float64.
        splits: ``(n,)`` of ``"train"``, ``"validation"`` and ``"test"``; ``None`` where the data set publishes none.
        scale: what a score is, in words.
        images: folder of the images, ``None`` where it was neither given nor found.
        notes: what else a reader of the table should know.
    """

    source: str
    names: list[str]
    scores: np.ndarray
    splits: list[str] | None
    scale: str
    images: Folder | None = None
    notes: tuple[str, ...] = ()

    def describe(self, config: ConvertConfig) -> str:
        """Say in a few lines what was found and what to do with it."""
        low, mean, high = self.scores.min(), self.scores.mean(), self.scores.max()
        counts = Counter(self.splits)
        split = ", ".join(f"{counts[name]:,} {name}" for name in ("train", "validation", "test") if counts[name])
        where = "file names only: set ratings.root to their folder" if self.images is None else self.images.address
        lines = [
            f"read        {self.source}",
            f"rated       {len(self.names):,} images, {low:.4g} to {high:.4g}, mean {mean:.4g} ({self.scale})",
            f"split       {f'{split}, as published' if self.splits else 'none published; training draws its own'}",
            f"images      {where}",
            *(f"note        {note}" for note in self.notes),
            f"output      {config.output}",
        ]
        root = " ratings.root=FOLDER" if self.images is None else ""
        return "\n".join(
            [*lines, f"next        jobs/train.py ratings.path={config.output}{root} output=… backbone.name=…"]
        )

    def encode(self, output: str) -> bytes:
        """The table of ratings as `ais.ratings.read_ratings` takes it: ``image``, ``score`` and, if any, ``split``."""
        addresses = self.names if self.images is None else [(self.images / name).address for name in self.names]
        columns: dict[str, Any] = {"image": addresses, "score": self.scores.tolist()}
        if self.splits is not None:
            columns["split"] = self.splits
        if output.endswith(".parquet"):
            sink = io.BytesIO()
            pq.write_table(pa.table(columns), sink)
            return sink.getvalue()
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
        return text.getvalue().encode()


@dataclass(frozen=True)
class Compared:
    """A human similarity matrix as a data set publishes it.

    Args:
        source: the file it comes from.
        matrix: ``(N, N)`` float64, larger is more alike.
        addresses: ``(N,)`` of the images, in its order.
    """

    source: str
    matrix: np.ndarray
    addresses: list[str]

    def describe(self, config: ConvertConfig) -> str:
        """Say in a few lines what was found and what to do with it."""
        above = self.matrix[np.triu_indices(len(self.matrix), k=1)]
        return "\n".join(
            (
                f"read        {self.source}",
                f"compared    {len(self.addresses):,} images, {above.min():.4g} to {above.max():.4g}, mean "
                f"{above.mean():.4g} (larger is more alike)",
                f"order       {posixpath.basename(self.addresses[0])}, {posixpath.basename(self.addresses[1])} … "
                f"{posixpath.basename(self.addresses[-1])}",
                f"output      {config.output}",
                f"next        jobs/importance.py objective=similarity matrix={config.output} backbone.name=… output=…",
            )
        )

    def encode(self, output: str) -> bytes:
        """The matrix with its images, as `ais.importance.matrix.read_matrix` takes it."""
        if output.endswith(".npz"):
            sink = io.BytesIO()
            np.savez_compressed(sink, matrix=self.matrix, images=np.array(self.addresses))
            return sink.getvalue()
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["image", *self.addresses])
        rows.writerows([address, *row] for address, row in zip(self.addresses, self.matrix.tolist(), strict=True))
        return text.getvalue().encode()


def read_dataset(config: ConvertConfig, storage: Storage) -> Rated | Compared:
    """Read a data set as it was unpacked.

    Raises:
        DatasetError: a file is missing or not as published; names file, line, value and the way out.
        SimilarityError: the numbers of a similarity matrix cannot be used.
    """
    source = storage.open(config.source)
    if config.dataset == "peterson":
        return read_peterson(source, config, storage)
    if config.dataset == "ava":
        rated, folders = read_ava(source)
    elif config.dataset == "koniq10k":
        rated, folders = read_koniq10k(source)
    else:
        rated, folders = read_aigciqa2023(source, config.aspect or "quality")
    return _with_images(rated, folders, config, storage)


def read_ava(source: Folder) -> tuple[Rated, list[Folder]]:
    """Mean votes of AVA, and where the images may be: ``<image id>.jpg``.

    ``AVA.txt`` has a line an image of 15 whole numbers: a running number, the image's id, how many people voted 1, 2 …
    10, two semantic tags, the challenge (README of the June 2012 release, mirrored at
    github.com/imfing/ava_downloader). The generic large-scale lists ``aesthetics_image_lists/generic_ls_train.jpgl``
    and ``generic_test.jpgl`` beside it hold an id a line and are the split; ids in neither list are left out and
    counted.
    """
    place = _file(source, ("AVA.txt", "AVA_dataset/AVA.txt"))
    scores: dict[str, float] = {}
    for number, line in enumerate(_lines(place), 1):
        fields = line.split()
        if len(fields) != 15:
            raise _bad_line(place, number, line, f"{len(fields)} fields instead of 15")
        if not all(field.isascii() and field.isdigit() for field in fields):
            raise _bad_line(place, number, line, "not all of its fields are whole numbers")
        if max(map(len, fields)) > _MOST_DIGITS:
            raise _bad_line(place, number, line, f"a number of more than {_MOST_DIGITS} digits")
        image, votes = fields[1], np.array(fields[2:12], np.int64)
        if image in scores:
            raise _bad_line(place, number, line, f"image {image} has a line before")
        if votes.sum() == 0:
            raise _bad_line(place, number, line, "nobody voted")
        scores[image] = float(votes @ np.arange(1, 11) / votes.sum())
    if not scores:
        raise DatasetError(f"{place.address!r} is empty; unpack it again")

    home = _parent(place)
    lists = {name: home / "aesthetics_image_lists" / f"{name}.jpgl" for name in ("generic_ls_train", "generic_test")}
    found = [name for name, listed in lists.items() if listed.exists()]
    if len(found) == 1:
        raise DatasetError(
            f"{_parent(lists[found[0]]).address!r} has one list of two, {found[0]}.jpgl; add the other or remove both"
        )
    notes: tuple[str, ...] = ()
    splits = None
    if found:
        split_of: dict[str, str] = {}
        for name, split in zip(lists, ("train", "test"), strict=True):
            for number, line in enumerate(_lines(lists[name]), 1):
                image = line.strip()
                if image not in scores:
                    raise _bad_line(lists[name], number, line, f"AVA.txt has no image {image}")
                if split_of.setdefault(image, split) != split:
                    raise _bad_line(lists[name], number, line, f"image {image} is in the training list too")
        left_out = len(scores) - len(split_of)
        notes = (f"{left_out:,} images are in neither list, and left out",) if left_out else ()
        scores = {image: score for image, score in scores.items() if image in split_of}
        splits = [split_of[image] for image in scores]
    rated = Rated(
        place.address,
        [f"{image}.jpg" for image in scores],
        np.array(list(scores.values())),
        splits,
        "mean of votes from 1 to 10",
        notes=notes,
    )
    return rated, [home / "images", home / "image", home / "images" / "images"]


def read_koniq10k(source: Folder) -> tuple[Rated, list[Folder]]:
    """Mean opinion scores of KonIQ-10k, and where the images may be.

    ``koniq10k_distributions_sets.csv`` has the columns ``image_name, c1 … c5, c_total, MOS, SD, set``, with MOS from 1
    to 100 and ``training``, ``validation`` or ``test`` (github.com/subpic/koniq, metadata/).
    ``koniq10k_scores_and_distributions.csv``, which comes with the images, has ``MOS_zscore`` instead of ``set``: that
    is the same score from 1 to 100, and its ``MOS`` the plain mean from 1 to 5 (github.com/SSL92/hyperIQA, folders.py).
    The first is preferred, for its split; the score is the one from 1 to 100 either way.
    """
    names = ("koniq10k_distributions_sets.csv", "koniq10k_scores_and_distributions.csv")
    place = _file(source, (*names, *(f"metadata/{name}" for name in names)))
    reader = csv.reader(_lines(place))
    rows = _records(place, reader)
    header = next(rows, [])
    score_column = "MOS_zscore" if "MOS_zscore" in header else "MOS"
    needed = ("image_name", score_column)
    if missing := [name for name in needed if name not in header]:
        raise DatasetError(
            f"{place.address!r} has no column {missing[0]!r}, it has {', '.join(map(repr, header))}; give "
            f"source={names[0]} or {names[1]} as published"
        )
    if score_column == "MOS" and "set" not in header:
        raise DatasetError(
            f"{place.address!r} has neither a column 'set' nor 'MOS_zscore', so that the scale of its 'MOS' is not "
            f"known; give source={names[0]} or {names[1]} as published"
        )
    splits_of = {"training": "train", "validation": "validation", "test": "test"}
    scores: dict[str, float] = {}
    splits: list[str] = []
    for fields in rows:
        number, line = reader.line_num, ",".join(fields)
        if len(fields) != len(header):
            raise _bad_line(place, number, line, f"{len(fields)} fields instead of {len(header)}")
        row = dict(zip(header, fields, strict=True))
        image = row["image_name"]
        if image in scores or not _is_name(image):
            raise _bad_line(place, number, line, f"image_name {image!r} has a line before, or is no file name")
        scores[image] = _score(place, number, line, row[score_column])
        if "set" in row:
            if row["set"] not in splits_of:
                raise _bad_line(place, number, line, f"set is {row['set']!r}, not training, validation or test")
            splits.append(splits_of[row["set"]])
    if not scores:
        raise DatasetError(f"{place.address!r} has a header and no lines; take the file as published")
    home = _parent(place)
    rated = Rated(
        place.address, list(scores), np.array(list(scores.values())), splits or None, "mean opinion score, 1 to 100"
    )
    return rated, [base / size for base in (home, _parent(home)) for size in ("1024x768", "512x384")]


def read_aigciqa2023(source: Folder, aspect: str) -> tuple[Rated, list[Folder]]:
    """Mean opinion scores of AIGCIQA2023 in one aspect, and where the images may be.

    ``DATA/MOS/mosz1.mat`` is quality, ``mosz2.mat`` authenticity and ``mosz3.mat`` correspondence
    (github.com/wangjiarui153/AIGCIQA2023); each holds ``MOSz``, one number an image, and number i belongs to
    ``Image/allimg/<i>.png``, counted from 0 (so the readers of github.com/chencn2020/PromptIQA and others).
    """
    number = ("quality", "authenticity", "correspondence").index(aspect) + 1
    place = _file(source, (f"DATA/MOS/mosz{number}.mat", f"MOS/mosz{number}.mat", f"mosz{number}.mat"))
    name = posixpath.basename(place.path)
    if name != f"mosz{number}.mat":
        raise DatasetError(
            f"source: {name!r} is not mosz{number}.mat, which holds aspect={aspect}; give the folder of the data set"
        )
    values = _matlab(place, re.compile("^MOSz$"))
    if values.ndim != 2 or min(values.shape) != 1:
        raise DatasetError(f"{place.address!r}: MOSz has the shape {values.shape}; take the file as published")
    scores = values.ravel().astype(np.float64)
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DatasetError(f"{place.address!r}: MOSz is {scores[at]} for image {at}.png; leave nothing out of the file")
    rated = Rated(
        place.address, [f"{index}.png" for index in range(len(scores))], scores, None, f"mean opinion score of {aspect}"
    )
    home = _parent(_parent(_parent(place)))
    return rated, [home / "Image" / "allimg", home / "allimg"]


def read_peterson(source: Folder, config: ConvertConfig, storage: Storage) -> Compared:
    """Similarities of one category of Peterson, Abbott and Griffiths (2018), as arXiv 2409.16292 uses them.

    A category's folder has 120 pictures in ``images`` and one matrix in ``sim_judgements``, a ``.mat`` file with
    ``sim`` in its name and in that of its variable (github.com/LukasMut/human_alignment, data/peterson.py), such as
    ``simMatrix`` (``turkResults_CogSci2016.mat`` of github.com/jcpeterson/percept2vec). A matrix as ``.npy``, ``.npz``
    or ``.csv`` is read too.

    Row i is the i-th picture, and the files do not say which that is. Where the order of the names as text and that of
    the numbers in them differ, nothing is guessed: ``order`` says it, or ``images`` names a list in the order of the
    matrix.
    """
    place = _similarity_file(source)
    if place.path.lower().endswith(".mat"):
        matrix, own = _matlab(place, re.compile("sim", re.IGNORECASE)), None
    else:
        matrix, own = read_matrix(place.address, storage)
    if own is not None:
        raise DatasetError(
            f"{place.address!r} names its images itself; give it as matrix= to jobs/importance.py as it is"
        )
    near = next(
        (home / "images" for home in (_parent(place), _parent(_parent(place))) if (home / "images").exists()), None
    )
    pictures = storage.open(config.images) if config.images else near
    if pictures is None:
        raise DatasetError(
            f"there is no folder 'images' near {place.address!r}: set images to the folder of its pictures"
        )
    if pictures.path.lower().endswith((".csv", ".parquet")):
        addresses = [image.uri for image in list_images(pictures.address, storage)]
    else:
        addresses = [(pictures / name).address for name in _ordered(_pictures(pictures), config.order, pictures)]
    return Compared(place.address, check_human_matrix(matrix, len(addresses)), addresses)


def _similarity_file(source: Folder) -> Folder:
    if not source.filesystem.isdir(source.path):
        return _file(source, ())
    found = [
        file for file in (source / "sim_judgements").files("*.mat") if "sim" in file.path.rpartition("/")[2].lower()
    ]
    if len(found) != 1:
        names = ", ".join(posixpath.basename(file.path) for file in found) or "none"
        raise DatasetError(
            f"{(source / 'sim_judgements').address!r} has to hold one .mat file with 'sim' in its name, it holds "
            f"{names}; give the file of the matrix as source, and the folder of its pictures as images"
        )
    return found[0]


def _ordered(names: list[str], order: str | None, pictures: Folder) -> list[str]:
    """The pictures in the order of the matrix."""
    by_name = sorted(names)
    numbers = {name: re.findall(r"\d+", posixpath.splitext(name)[0]) for name in names}
    countable = all(len(found) == 1 for found in numbers.values())
    if order == "number" and not countable:
        odd = next(name for name, found in numbers.items() if len(found) != 1)
        raise DatasetError(f"order=number: {odd!r} in {pictures.address!r} does not hold one number; set order=name")
    by_number = sorted(names, key=lambda name: int(numbers[name][0])) if countable else by_name
    if order is None and by_number != by_name:
        at = next(i for i, pair in enumerate(zip(by_name, by_number, strict=True)) if pair[0] != pair[1])
        raise DatasetError(
            f"row {at + 1} of the matrix may be {by_name[at]!r} (order=name) or {by_number[at]!r} (order=number) of "
            f"{pictures.address!r}: set order, or give as images a list in the order of the matrix"
        )
    return by_number if order == "number" else by_name


def _with_images(rated: Rated, usual: Sequence[Folder], config: ConvertConfig, storage: Storage) -> Rated:
    """Say where the images are, and check that they are there."""
    given = storage.open(config.images) if config.images is not None else None
    folder = given or next((place for place in usual if place.filesystem.isdir(place.path)), None)
    if folder is None:
        return rated
    there = set(_pictures(folder))
    absent = [index for index, name in enumerate(rated.names) if name not in there]
    if not absent:
        return replace(rated, images=folder)
    first = rated.names[absent[0]]
    if config.missing == "error" or len(absent) == len(rated.names):
        raise DatasetError(
            f"{len(absent):,} of {len(rated.names):,} rated images are not in {folder.address!r}, the first {first!r}; "
            f"{'set images to their folder' if len(absent) == len(rated.names) else 'missing=skip leaves them out'}"
        )
    kept = np.setdiff1d(np.arange(len(rated.names)), absent)
    return replace(
        rated,
        names=[rated.names[index] for index in kept],
        scores=rated.scores[kept],
        splits=None if rated.splits is None else [rated.splits[index] for index in kept],
        images=folder,
        notes=(*rated.notes, f"{len(absent):,} rated images are not there and left out, the first {first}"),
    )


def _pictures(folder: Folder) -> list[str]:
    names = [posixpath.basename(file.path) for file in folder.files()]
    return [name for name in names if _PICTURE.search(name)]


def _file(source: Folder, names: Sequence[str]) -> Folder:
    """The source itself if it is a file, otherwise the first of the names in it.

    Raises:
        DatasetError: there is none.
    """
    if not source.exists():
        raise DatasetError(f"source {source.address!r} does not exist; give the folder of the unpacked data set")
    if not source.filesystem.isdir(source.path):
        return source
    found = next((source / name for name in names if (source / name).exists()), None)
    if found is None:
        there = sorted(
            posixpath.basename(str(path).rstrip("/")) for path in source.filesystem.ls(source.path, detail=False)
        )
        shown = ", ".join(there[:8]) + (" …" if len(there) > 8 else "")
        raise DatasetError(
            f"source {source.address!r} has no {' or '.join(names)}; it has {shown or 'nothing'}; give the folder that "
            "holds it, or the file itself"
        )
    return found


def _parent(place: Folder) -> Folder:
    return Folder(place.filesystem, posixpath.dirname(place.path))


def _read(place: Folder) -> bytes:
    try:
        with reading(place):
            data = place.read_bytes(_MAX_BYTES)
    except OSError as error:
        raise DatasetError(
            f"{place.address!r} cannot be read: {type(error).__name__}: {error}; check the address and the access to it"
        ) from error
    if len(data) > _MAX_BYTES:
        raise DatasetError(
            f"{place.address!r} has more than {_MAX_BYTES:,} bytes; no file of these data sets has; check the source"
        )
    return data


def _lines(place: Folder) -> Iterator[str]:
    try:
        text = _read(place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{place.address!r} is not text ({error}); give the file as published") from error
    yield from text.splitlines()


def _records(place: Folder, reader: Any) -> Iterator[list[str]]:
    """The lines of a ``csv.reader``, which refuses what a lost quotation mark makes of the rest of a file."""
    try:
        yield from reader
    except csv.Error as error:
        raise _bad_line(place, reader.line_num, "", str(error)) from error


def _bad_line(place: Folder, number: int, line: str, reason: str) -> DatasetError:
    shown = line if len(line) <= _SHOWN else line[:_SHOWN] + "…"
    return DatasetError(f"{place.address!r}, line {number}, {shown!r}: {reason}; take the file as published")


def _score(place: Folder, number: int, line: str, text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not np.isfinite(score):
        raise _bad_line(place, number, line, f"the score is {text!r}, not a finite number")
    return score


def _is_name(text: str) -> bool:
    return bool(_PICTURE.search(text)) and "/" not in text


def _matlab(place: Folder, wanted: re.Pattern[str]) -> np.ndarray:
    """The one numeric variable of a MATLAB file whose name matches.

    Of the file's variables only this one is read, after a look at its size. ``scipy.io.loadmat`` builds arrays and
    runs nothing that a file says.
    """
    data = _read(place)
    if data.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise DatasetError(
            f"{place.address!r} is a MATLAB file of version 7.3, which is HDF5 and not read here; in MATLAB, load it "
            "and save it again with save(name, '-v7')"
        )
    try:
        contents = scipy.io.whosmat(io.BytesIO(data))
    except Exception as error:  # whatever the bytes of another file lead to
        raise DatasetError(
            f"{place.address!r} is not a MATLAB file of version 5 to 7: {error}; take it as published"
        ) from error
    matching = [(name, shape) for name, shape, _ in contents if wanted.search(name)]
    if len(matching) != 1:
        names = ", ".join(name for name, _, _ in contents) or "none"
        raise DatasetError(
            f"{place.address!r} has to hold one variable that matches {wanted.pattern!r}; its variables: {names}; "
            "take the file as published"
        )
    ((name, shape),) = matching
    if np.prod(shape, dtype=float) > _MAX_NUMBERS:
        raise DatasetError(f"{place.address!r}: {name} has the shape {shape}, more than a matrix of 4096 images")
    try:
        value = np.asarray(scipy.io.loadmat(io.BytesIO(data), variable_names=[name])[name])
    except Exception as error:  # damaged, or an object that is no array
        raise DatasetError(f"{place.address!r}: {name} cannot be read: {error}; download the file again") from error
    if value.dtype.kind not in "iuf":
        raise DatasetError(f"{place.address!r}: {name} holds {value.dtype}, not numbers; take the file as published")
    return value


def write_converted(converted: Rated | Compared, config: ConvertConfig, storage: Storage) -> None:
    """Write the table or the matrix to ``output``, unless it is there already.

    Raises:
        ConfigError: something else is there.
        StorageError: what is there cannot be read, or the output not be written.
    """
    output = absolute(config.output)
    place, data = storage.open(output), converted.encode(output)
    if place.exists():
        with reading(place):
            same = place.filesystem.isfile(place.path) and place.read_bytes() == data
        if not same:
            raise ConfigError(f"output: {config.output!r} exists and holds something else; give another output")
        return
    place.write_bytes(data)
