"""One row for every image of a collection: what is known, what changed since, and what a run has to score.

A *snapshot* is the collection as one run left it, sorted by address. The next run compares it with a listing, which
gives a *draft* of the next snapshot: the same rows, with those to score still open; the draft and the run's results
give the snapshot. Everything streams; in memory is a piece of each table, and 12 bytes for every image to score.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ais.listing import ListedImage
from ais.runs import FLEETING, Run
from ais.scoring.sorting import side_by_side
from ais.shards import read_column

PRESENT, GONE, FAILED = "present", "gone", "failed"

SNAPSHOT_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("mtime", pa.float64()),
        pa.field("score", pa.float32()),
        pa.field("score_std", pa.float32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("status_since", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("run_id", pa.string()),
        pa.field("scored_at", pa.timestamp("us", "UTC")),
    ]
)
DRAFT_SCHEMA = SNAPSHOT_SCHEMA.append(pa.field("image_id", pa.int64())).append(
    pa.field("change", pa.string(), nullable=False)
)
LISTING_SCHEMA = pa.schema([SNAPSHOT_SCHEMA.field(name) for name in ("uri", "size", "etag", "mtime")])

_LISTING_ROWS = 10_000
ANY_REASON = ""


@dataclass
class ListingDigest:
    """Tells whether two listings are of the same images in the same versions, whatever their order.

    The sum, modulo 2¹²⁸, of a 128-bit hash of every image's address and version: equal sets have equal sums, and
    others differ but for a chance of 2⁻¹²⁸.
    """

    images: int = 0
    total: int = 0

    def add(self, image: ListedImage) -> None:
        """Take in one image."""
        name = f"{len(image.uri)}:{image.uri}:{image.version}".encode()
        self.images += 1
        self.total = (self.total + int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")) % 2**128

    def __str__(self) -> str:
        return f"{self.images}-{self.total:032x}"


def listing_tables(listing: Iterable[ListedImage], digest: ListingDigest) -> Iterator[pa.Table]:
    """Turn a listing into tables of `LISTING_SCHEMA`, in its order, and take it into the digest."""
    images = iter(listing)
    while chunk := list(islice(images, _LISTING_ROWS)):
        for image in chunk:
            digest.add(image)
        columns = [[getattr(image, name) for image in chunk] for name in LISTING_SCHEMA.names]
        yield pa.table(
            [pa.array(values, field.type) for values, field in zip(columns, LISTING_SCHEMA, strict=True)],
            schema=LISTING_SCHEMA,
        )


@dataclass
class Changes:
    """How a listing differs from the snapshot before it, in images.

    Args:
        listed: addresses in the listing.
        repeated: further rows of the listing with an address that it has already.
        new: not in the snapshot.
        changed: there with another version.
        retried: there without a score that is worth another try.
        returned: were gone, and are back in the version that was scored.
        gone: were there, and are not listed.
        kept: listed and as they were (failed ones that are not retried among them).
        forgotten: gone for so long that their rows are left out.
    """

    listed: int = 0
    repeated: int = 0
    new: int = 0
    changed: int = 0
    retried: int = 0
    returned: int = 0
    gone: int = 0
    kept: int = 0
    forgotten: int = 0

    @property
    def to_score(self) -> int:
        """Images that the run has to work on."""
        return self.new + self.changed + self.retried

    @property
    def any(self) -> bool:
        """Whether a row of the snapshot changes (rows to forget alone are no reason to write it anew)."""
        return bool(self.to_score + self.returned + self.gone)

    def as_dict(self) -> dict[str, int]:
        """Plain data for JSON."""
        return asdict(self)

    def repeat(self, rows: int) -> None:
        """Count rows left out because their address was listed before."""
        self.repeated += rows


def draft(
    previous: Iterator[pa.Table],
    listing: Iterator[pa.Table],
    changes: Changes,
    *,
    now: datetime,
    retry: str | None = FLEETING,
    forget_before: datetime | None = None,
) -> Iterator[pa.Table]:
    """Compare a listing with the snapshot before it.

    An image is its address; its version is its etag or, where neither side has one, its size and time of change. Images
    to score get the ids 0, 1, 2, … in the order of addresses.

    Args:
        previous: the snapshot, sorted; one empty table if there is none.
        listing: tables of `LISTING_SCHEMA`, sorted, every address once.
        changes: counted here.
        now: when the listing was made.
        retry: regular expression of the reasons for which failed images are tried again; ``None``: for none.
        forget_before: leave out rows of images gone since before then.

    Returns:
        tables of `DRAFT_SCHEMA`, sorted.
    """
    for known, listed in side_by_side([previous, listing]):
        first = changes.to_score
        rows = [_listed_rows(known, listed, changes, now, retry), _gone_rows(known, listed, changes, now)]
        table = pa.concat_tables(rows)
        if forget_before is not None:
            old = pc.and_(pc.equal(table["status"], GONE), pc.less(table["status_since"], pa.scalar(forget_before)))
            kept = table.filter(pc.invert(old))
            changes.forgotten += table.num_rows - kept.num_rows
            table = kept
        table = table.take(pc.sort_indices(table, sort_keys=[("uri", "ascending")]))
        open_rows = np.isin(table["change"].to_numpy(), ("new", "changed", "retried"))
        ids = pa.array(first + np.cumsum(open_rows) - 1, mask=~open_rows)
        yield table.append_column(DRAFT_SCHEMA.field("image_id"), ids).select(DRAFT_SCHEMA.names)


def _listed_rows(known: pa.Table, listed: pa.Table, changes: Changes, now: datetime, retry: str | None) -> pa.Table:
    before = known.take(pc.index_in(listed["uri"], known["uri"].combine_chunks()))  # null rows where it was not known
    is_known = pc.is_valid(before["uri"])
    same = pc.and_(is_known, _same_version(before, listed))
    was_gone = _filled(pc.equal(before["status"], GONE))
    has_score = pc.is_valid(before["score"])
    again = was_gone
    if retry is not None:
        again = pc.or_(was_gone, _filled(pc.match_substring_regex(before["reason"], retry)))
    change = pc.case_when(
        pc.make_struct(
            pc.invert(is_known), pc.invert(same), pc.and_(has_score, was_gone), pc.or_(has_score, pc.invert(again))
        ),
        "new",
        "changed",
        "returned",
        "kept",
        "retried",
    )
    counts = Counter(change.to_pylist())
    changes.listed += listed.num_rows
    for kind in ("new", "changed", "retried", "returned", "kept"):
        setattr(changes, kind, getattr(changes, kind) + counts[kind])
    kept = pc.equal(change, "kept")
    scored = pc.is_in(change, pa.array(["kept", "returned"]))
    columns = {
        **{name: listed[name] for name in LISTING_SCHEMA.names},
        **{name: pc.if_else(scored, before[name], None) for name in ("score", "score_std", "run_id", "scored_at")},
        "status": pc.if_else(kept, before["status"], PRESENT),
        "reason": pc.if_else(kept, before["reason"], None),
        "status_since": pc.if_else(kept, before["status_since"], pa.scalar(now, pa.timestamp("us", "UTC"))),
        "change": change,
    }
    return _draft_rows(columns)


def _gone_rows(known: pa.Table, listed: pa.Table, changes: Changes, now: datetime) -> pa.Table:
    missing = known.filter(pc.invert(pc.is_in(known["uri"], listed["uri"].combine_chunks())))
    already = pc.equal(missing["status"], GONE)
    changes.gone += missing.num_rows - (pc.sum(already).as_py() or 0)
    since = pc.if_else(already, missing["status_since"], pa.scalar(now, pa.timestamp("us", "UTC")))
    columns = {name: missing[name] for name in SNAPSHOT_SCHEMA.names}
    columns |= {
        "status": pa.array([GONE] * missing.num_rows, pa.string()),
        "status_since": since,
        "change": pc.if_else(already, "kept", "gone"),
    }
    return _draft_rows(columns)


def _draft_rows(columns: dict[str, pa.ChunkedArray]) -> pa.Table:
    fields = [field for field in DRAFT_SCHEMA if field.name != "image_id"]
    return pa.table([columns[field.name].cast(field.type) for field in fields], schema=pa.schema(fields))


def _same_version(before: pa.Table, listed: pa.Table) -> pa.ChunkedArray:
    """As ``ListedImage.version`` tells versions apart, for whole columns."""
    etags = [pc.fill_null(table["etag"], "") for table in (before, listed)]
    without = pc.and_(pc.equal(etags[0], ""), pc.equal(etags[1], ""))
    size_and_time = pc.and_(*(_same(before[name], listed[name]) for name in ("size", "mtime")))
    return pc.if_else(without, size_and_time, pc.equal(*etags))


def _same(one: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.or_(_filled(pc.equal(one, other)), pc.and_(pc.is_null(one), pc.is_null(other)))


def _filled(condition: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(condition, False)


@dataclass(frozen=True)
class Outcomes:
    """What became of the images that a run worked on, by ``image_id``.

    Args:
        scores: ``(n,)`` float32, NaN where it failed.
        spreads: ``(n,)`` float32 standard deviations over the heads, NaN where there is none.
        codes: ``(n,)`` int32 index into ``reasons``, -1 where it was scored.
        reasons: ``stage: reason``.
    """

    scores: np.ndarray
    spreads: np.ndarray
    codes: np.ndarray
    reasons: list[str]

    @classmethod
    def none(cls) -> Outcomes:
        """Of a run that had nothing to score."""
        return cls(np.empty(0, np.float32), np.empty(0, np.float32), np.empty(0, np.int32), [])

    @classmethod
    def of(cls, run: Run, images: int) -> Outcomes:
        """Read them from results and errors, which account for every image (`Run.account`)."""
        scores, spreads = np.full(images, np.nan, np.float32), np.full(images, np.nan, np.float32)
        codes = np.full(images, -1, np.int32)
        known: dict[str, int] = {}
        for shard in run.results.files("*.parquet"):
            ids = read_column(shard, "image_id")
            scores[ids], spreads[ids] = read_column(shard, "score"), read_column(shard, "score_std")
        for shard in run.errors.files("*.parquet"):
            ids = read_column(shard, "image_id")
            pairs = zip(read_column(shard, "stage"), read_column(shard, "reason"), strict=True)
            codes[ids] = [known.setdefault(f"{stage}: {reason}", len(known)) for stage, reason in pairs]
        return cls(scores, spreads, codes, list(known))


@dataclass
class Census:
    """What a snapshot holds, counted while it is written.

    Args:
        present: images with a score.
        failed: images that could not be used.
        gone: images that are not listed any more.
        retryable: of the failed ones, those that a later run tries again.
        runs: run ids that rows come from.
        new_failed: of the images that are new or changed, those that could not be used.
        scores: of the images that are present.
        new_scores: of those that are new or changed.
    """

    present: int = 0
    failed: int = 0
    gone: int = 0
    retryable: int = 0
    runs: set[str] = field(default_factory=set)
    new_failed: int = 0
    scores: list[np.ndarray] = field(default_factory=list)
    new_scores: list[np.ndarray] = field(default_factory=list)

    def add(self, table: pa.Table, change: np.ndarray) -> None:
        """Count the rows of a table; ``change`` is the column of the draft."""
        status, score = table["status"].to_numpy(), table["score"].to_numpy()
        fresh = np.isin(change, ("new", "changed"))
        present, failed = status == PRESENT, status == FAILED
        self.present += int(present.sum())
        self.failed += int(failed.sum())
        self.gone += int((status == GONE).sum())
        self.new_failed += int((failed & fresh).sum())
        reasons = table.filter(pa.array(failed))["reason"]
        self.retryable += pc.sum(pc.match_substring_regex(reasons, FLEETING)).as_py() or 0
        self.runs.update(pc.unique(table["run_id"].drop_null()).to_pylist())
        self.scores.append(score[present])
        self.new_scores.append(score[present & fresh])


def completed(
    drafted: Iterable[pa.Table], outcomes: Outcomes, run_id: str, now: datetime, census: Census
) -> Iterator[pa.Table]:
    """Fill the open rows of a draft with what became of them.

    Args:
        drafted: tables of `DRAFT_SCHEMA`.
        outcomes: by the draft's ``image_id``.
        run_id: that rows scored or tried now are attributed to.
        now: ``scored_at`` of these rows: when the listing was made.
        census: counted here.

    Returns:
        tables of `SNAPSHOT_SCHEMA`.
    """
    reasons = pa.array([*outcomes.reasons, None], pa.string())  # the last one for codes of -1
    time = pa.scalar(now, pa.timestamp("us", "UTC"))
    for table in drafted:
        rows = pc.is_valid(table["image_id"]).to_numpy()
        ids = table["image_id"].drop_null().to_numpy()

        def spread_out(values: np.ndarray, rows: np.ndarray = rows) -> pa.Array:
            whole = np.zeros(len(rows), values.dtype)
            whole[rows] = values
            return pa.array(whole)

        codes = outcomes.codes[ids]
        failed, is_open = spread_out(codes >= 0), pa.array(rows)
        scored = pc.and_(is_open, pc.invert(failed))
        spreads = spread_out(outcomes.spreads[ids])
        reason = reasons.take(spread_out(np.where(codes >= 0, codes, len(reasons) - 1)))
        columns = {
            "score": pc.if_else(scored, spread_out(outcomes.scores[ids]), table["score"]),
            "score_std": pc.if_else(scored, pc.if_else(pc.is_nan(spreads), None, spreads), table["score_std"]),
            "status": pc.if_else(failed, FAILED, table["status"]),
            "reason": pc.if_else(failed, reason, table["reason"]),
            "status_since": pc.if_else(is_open, time, table["status_since"]),
            "run_id": pc.if_else(is_open, run_id, table["run_id"]),
            "scored_at": pc.if_else(scored, time, table["scored_at"]),
        }
        columns |= {name: table[name] for name in LISTING_SCHEMA.names}
        snapshot = pa.table([columns[field.name] for field in SNAPSHOT_SCHEMA], schema=SNAPSHOT_SCHEMA)
        census.add(snapshot, table["change"].to_numpy())
        yield snapshot


def images_to_score(drafted: Iterable[pa.Table]) -> Iterator[ListedImage]:
    """The open rows of a draft, in the order of their ids: the listing that the run sets out with."""
    for table in drafted:
        rows = table.filter(pc.is_valid(table["image_id"])).select(LISTING_SCHEMA.names)
        for row in rows.to_pylist():
            yield ListedImage(**row)
