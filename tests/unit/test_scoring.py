"""The algebra of scheduled scoring, without Ray: what changed, what a snapshot holds, what may be deleted, what drifts.

Faked: results and errors are arrays, not the run of a network. Files are real, on a local disk.
"""

import json
import zlib
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from ais.errors import RunError
from ais.listing import ListedImage
from ais.runs import FLEETING, Run
from ais.scoring.collection import (
    DRAFT_SCHEMA,
    LISTING_SCHEMA,
    SNAPSHOT_SCHEMA,
    Census,
    Changes,
    ListingDigest,
    Outcomes,
    completed,
    draft,
    images_to_score,
    listing_tables,
)
from ais.scoring.drift import Drift, Shares, Thresholds, compare, ks, psi, quantiles, sorted_scores
from ais.scoring.files import copy, read_tables, write_tables
from ais.scoring.series import Series, Snapshot, State, duration, prune_all, tick_of
from ais.scoring.sorting import first_of_each, side_by_side, sort_by_uri
from ais.storage import Storage

START = datetime(2026, 11, 1, tzinfo=UTC)
NAMES = [f"/i/{name}.png" for name in ("a", "a b", "a/c", "B", "z", "ü", "画", "\U0001f600", "", "~")]


def table_of(uris: list[str], **columns: Any) -> pa.Table:
    return pa.table({"uri": pa.array(uris, pa.string()), **columns})


class TestSorting:
    @pytest.mark.parametrize("run_rows", [3, 7, 1000])
    def test_sorts_by_bytes_and_keeps_the_order_of_equals(self, tmp_path: Path, run_rows: int) -> None:
        rng = np.random.default_rng(run_rows)
        uris = [NAMES[n] + str(m) for n, m in rng.integers(0, (len(NAMES), 9), (200, 2))]
        tables = [
            table_of(uris[start : start + 17], row=range(start, min(start + 17, 200))) for start in range(0, 200, 17)
        ]
        merged = pa.concat_tables(list(sort_by_uri(tables, tmp_path, run_rows)))
        order = sorted(range(200), key=lambda row: (uris[row].encode(), row))
        assert merged["row"].to_pylist() == order
        assert list(tmp_path.iterdir()) == []

    def test_only_the_first_of_each_address_is_left(self) -> None:
        repeated: list[int] = []
        tables = [
            table_of(["a", "a", "b"], row=[0, 1, 2]),
            table_of([], row=pa.array([], pa.int64())),
            table_of(["c"], row=[3]),
        ]
        left = pa.concat_tables(list(first_of_each(tables, repeated.append)))
        assert left["row"].to_pylist() == [0, 2, 3]
        assert repeated == [1]

    def test_side_by_side_gives_every_row_once_and_addresses_together(self) -> None:
        rng = np.random.default_rng(0)
        sources = []
        for _ in range(3):
            uris = sorted(f"{number:03d}" for number in rng.integers(0, 60, 80))
            cuts = [0, *sorted(rng.integers(0, 80, 6)), 80]
            sources.append([table_of(uris[start:stop]) for start, stop in pairwise(cuts)])
        steps = list(side_by_side([iter(source) for source in sources]))
        for index, source in enumerate(sources):
            assert pa.concat_tables([step[index] for step in steps]).equals(pa.concat_tables(source))
        ranges = [sorted({uri for table in step for uri in table["uri"].to_pylist()}) for step in steps]
        assert len(steps) > 10
        assert all(before[-1] < after[0] for before, after in pairwise(ranges))


@dataclass
class Image:
    """What the reference model knows of one address."""

    version: tuple[int | None, str | None, float | None]
    status: str
    score: float | None = None
    reason: str | None = None
    run_id: str | None = None
    since: datetime = START
    scored_at: datetime | None = None


def outcome_of(uri: str, version: object, tick: int) -> tuple[float | None, str | None]:
    """Score or reason of an image: fixed by address and version, but for fetching, which may work another time."""
    number = zlib.crc32(f"{uri} {version}".encode()) % 10
    if number == 0:
        return None, "decode: truncated"
    if number == 1 and (tick + len(uri)) % 3:
        return None, "fetch: unreadable"
    return float(number), None


class Model:
    """The obvious way: a dictionary, one image at a time."""

    def __init__(self) -> None:
        self.images: dict[str, Image] = {}
        self.scored: list[str] = []

    def tick(
        self, listing: list[ListedImage], tick: int, now: datetime, retry: bool, forget_before: datetime | None
    ) -> None:
        listed = {image.uri: image for image in reversed(listing)}  # the first of several counts
        self.scored = []
        for uri, image in listed.items():
            version = (image.size, image.etag, image.mtime)
            known = self.images.get(uri)
            same = known is not None and ListedImage(uri, *known.version).version == image.version
            if known is not None and same and known.score is not None:
                if known.status == "gone":
                    known.status, known.since = "present", now
            elif (
                known is not None
                and same
                and known.status == "failed"
                and not (retry and (known.reason or "").startswith("fetch"))
            ):
                pass
            else:
                score, reason = outcome_of(uri, image.version, tick)
                status = "present" if reason is None else "failed"
                self.images[uri] = Image(
                    version, status, score, reason, f"t{tick}", now, now if reason is None else None
                )
                self.scored.append(uri)
            self.images[uri].version = version
        for uri in self.images.keys() - listed.keys():
            gone = self.images[uri]
            if gone.status != "gone":
                gone.status, gone.since = "gone", now
        if forget_before is not None:
            self.images = {
                uri: image
                for uri, image in self.images.items()
                if not (image.status == "gone" and image.since < forget_before)
            }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "uri": uri,
                "size": image.version[0],
                "etag": image.version[1],
                "mtime": image.version[2],
                "score": image.score,
                "score_std": None,
                "status": image.status,
                "reason": image.reason,
                "status_since": image.since,
                "run_id": image.run_id,
                "scored_at": image.scored_at,
            }
            for uri, image in sorted(self.images.items(), key=lambda item: item[0].encode())
        ]


def one_tick(
    previous: pa.Table,
    listing: list[ListedImage],
    tick: int,
    now: datetime,
    retry: bool,
    forget: datetime | None,
    path: Path,
) -> tuple[pa.Table, Changes, Census, list[ListedImage]]:
    """What the job does between a listing and the next snapshot, with small pieces."""
    changes, census = Changes(), Census()
    pieces = [previous.slice(0, 0), *(previous.slice(start, 3) for start in range(0, previous.num_rows, 3))]
    tables = sort_by_uri(listing_tables(listing, ListingDigest()), path, run_rows=4)
    rows = draft(
        iter(pieces),
        first_of_each(tables, changes.repeat),
        changes,
        now=now,
        retry=FLEETING if retry else None,
        forget_before=forget,
    )
    write_tables(path / "draft.parquet", rows, DRAFT_SCHEMA)
    to_score = list(images_to_score(read_tables(path / "draft.parquet")))
    found = [outcome_of(image.uri, image.version, tick) for image in to_score]
    reasons = sorted({reason for _, reason in found if reason})
    outcomes = Outcomes(
        np.array([np.nan if score is None else score for score, _ in found], np.float32),
        np.full(len(found), np.nan, np.float32),
        np.array([-1 if reason is None else reasons.index(reason) for _, reason in found], np.int32),
        reasons,
    )
    drafted = read_tables(path / "draft.parquet")
    snapshot = pa.concat_tables([SNAPSHOT_SCHEMA.empty_table(), *completed(drafted, outcomes, f"t{tick}", now, census)])
    return snapshot, changes, census, to_score


def random_listing(rng: np.random.Generator, known: dict[str, ListedImage], before: set[str]) -> list[ListedImage]:
    """The listing of the next night: some images new, some with another version, missing or back, in any order.

    ``known`` holds the last version of each, ``before`` what was listed last.
    """
    listing = []
    for uri in NAMES:
        if rng.random() < (0.2 if uri in before else 0.6):
            continue
        image = known.get(uri)
        if image is None or rng.random() < 0.2:
            etag = [None, "", f"e{rng.integers(3)}"][rng.integers(3)]
            size, mtime = ([None, 5, 6][rng.integers(3)], [None, 1.5, 2.5][rng.integers(3)])
            image = ListedImage(uri, size, etag, mtime)
        elif image.etag:
            image = replace(image, mtime=float(rng.integers(3)))  # of no matter beside an etag
        listing.append(image)
    known |= {image.uri: image for image in listing}
    if listing and rng.random() < 0.3:
        listing.append(replace(listing[0], etag="another"))
        known[listing[0].uri] = listing[0]
    order = rng.permutation(len(listing))
    return [listing[index] for index in order]


class TestSnapshots:
    @pytest.mark.parametrize("seed", range(8))
    def test_many_nights_equal_the_obvious_way(self, tmp_path: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        model, snapshot = Model(), SNAPSHOT_SCHEMA.empty_table()
        known: dict[str, ListedImage] = {}
        listing: list[ListedImage] = []
        seen: Changes = Changes()
        for tick in range(16):
            now = START + timedelta(days=tick)
            listing = random_listing(rng, known, {image.uri for image in listing})
            retry = bool(rng.random() < 0.7)
            forget = now - timedelta(days=2) if seed % 2 else None
            snapshot, changes, census, to_score = one_tick(snapshot, listing, tick, now, retry, forget, tmp_path)
            model.tick(listing, tick, now, retry, forget)
            assert snapshot.to_pylist() == model.rows()
            assert sorted(image.uri for image in to_score) == sorted(model.scored)
            assert changes.to_score == len(to_score)
            assert changes.repeated == len(listing) - len({image.uri for image in listing})
            assert changes.listed == changes.to_score + changes.returned + changes.kept
            statuses = snapshot["status"].to_pylist()
            assert (census.present, census.failed, census.gone) == tuple(
                statuses.count(status) for status in ("present", "failed", "gone")
            )
            assert census.runs == set(snapshot["run_id"].drop_null().to_pylist())
            assert sorted(np.concatenate(census.scores)) == sorted(
                row["score"] for row in snapshot.to_pylist() if row["status"] == "present"
            )
            for kind, count in asdict(changes).items():
                setattr(seen, kind, getattr(seen, kind) + count)
        assert min(seen.new, seen.changed, seen.returned, seen.gone, seen.kept, seen.repeated) > 0
        assert bool(seen.forgotten) == bool(seed % 2)

    def test_the_same_listing_again_changes_nothing(self, tmp_path: Path) -> None:
        listing = [ListedImage(uri, size=len(uri), mtime=1.0) for uri in NAMES]
        first, changes, _, to_score = one_tick(SNAPSHOT_SCHEMA.empty_table(), listing, 0, START, True, None, tmp_path)
        assert (changes.new, len(to_score), changes.any) == (len(NAMES), len(NAMES), True)
        again, changes, _, to_score = one_tick(first, listing[::-1], 1, START, False, None, tmp_path)
        assert again.equals(first)
        assert (changes.any, to_score, changes.kept) == (False, [], len(NAMES))

    def test_a_failed_image_of_the_same_bytes_is_tried_again_only_where_fetching_failed(self, tmp_path: Path) -> None:
        rows = [
            {
                "uri": f"/{number}",
                "size": 1,
                "status": "failed",
                "reason": reason,
                "status_since": START,
                "run_id": "t0",
            }
            for number, reason in enumerate(
                [
                    "fetch: unreadable",
                    "decode: truncated",
                    "score: not finite",
                    "decode: out of memory",
                    "fetch: not found",
                ]
            )
        ]
        before = pa.Table.from_pylist(rows, SNAPSHOT_SCHEMA)
        listing = [ListedImage(f"/{number}", size=1) for number in range(5)]
        for retry, expected in ((True, ["/0", "/3", "/4"]), (False, [])):
            _, changes, _, to_score = one_tick(before, listing, 1, START, retry, None, tmp_path)
            assert [image.uri for image in to_score] == expected
            assert changes.retried == len(expected)
        census = Census()
        census.add(before, np.full(5, "kept"))
        assert (census.retryable, census.failed) == (3, 5)

    def test_digests_of_listings(self) -> None:
        images = [ListedImage(uri, size=1, mtime=2.0) for uri in NAMES]

        def digest(listing: list[ListedImage]) -> str:
            found = ListingDigest()
            tables = list(listing_tables(listing, found))
            assert sum(table.num_rows for table in tables) == len(listing)
            assert all(table.schema.equals(LISTING_SCHEMA) for table in tables)
            return str(found)

        assert digest(images) == digest(images[::-1])
        others = [
            images[1:],
            [*images, images[0]],
            [replace(images[0], size=2), *images[1:]],
            [replace(images[0], etag="e"), *images[1:]],
            [replace(images[0], uri="/other"), *images[1:]],
        ]
        assert len({digest(images), *map(digest, others)}) == 6

    def test_outcomes_are_read_from_results_and_errors(self, tmp_path: Path) -> None:
        run = Run.at(str(tmp_path), "t", Storage())
        Path(run.results.path).mkdir(parents=True)
        Path(run.errors.path).mkdir()
        pq.write_table(
            pa.table(
                {
                    "image_id": [2, 0],
                    "score": pa.array([1.5, 2.5], pa.float32()),
                    "score_std": pa.array([0.5, None], pa.float32()),
                }
            ),
            Path(run.results.path) / "part-a.parquet",
        )
        pq.write_table(
            pa.table({"image_id": [1], "stage": ["decode"], "reason": ["truncated"]}),
            Path(run.errors.path) / "part-a.parquet",
        )
        found = Outcomes.of(run, 3)
        np.testing.assert_array_equal(found.scores, np.array([2.5, np.nan, 1.5], np.float32))
        np.testing.assert_array_equal(found.spreads, np.array([np.nan, np.nan, 0.5], np.float32))
        assert (found.codes.tolist(), found.reasons) == ([-1, 0, -1], ["decode: truncated"])


def scores(*values: float) -> np.ndarray:
    return np.sort(np.array(values, np.float32))


class TestDrift:
    def test_psi_by_hand(self) -> None:
        reference = scores(*range(10))  # one in each of ten bins: edges 1, 2, …, 9
        current = scores(*([0.5] * 5 + [9.0] * 5))  # half in the first bin, half in the last
        found = psi(reference, current)
        assert found.edges == [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert found.reference == [0.1] * 10
        assert found.current == [0.5, *[0.0] * 8, 0.5]
        by_hand = 2 * (0.5 - 0.1) * np.log(0.5 / 0.1) + 8 * (1e-4 - 0.1) * np.log(1e-4 / 0.1)
        assert found.value == pytest.approx(by_hand, rel=1e-12)
        assert found.by_chance == pytest.approx(9 * (1 / 10 + 1 / 10))
        assert psi(reference, reference).value == 0

    def test_bins_of_equal_scores_merge(self) -> None:
        found = psi(scores(1, 1, 1, 1, 1, 1, 2, 3, 4, 5), scores(1, 5))
        assert found.edges == [2, 3, 4, 5]
        assert found.reference == [0.6, 0.1, 0.1, 0.1, 0.1]
        assert found.current == [0.5, 0, 0, 0, 0.5]
        constant = psi(scores(3, 3, 3), scores(2, 3, 4, 4))  # below, at and above
        assert constant.current == [0.25, 0.25, 0.5]
        assert constant.reference == [0, 1, 0]
        assert constant.value > 1

    def test_psi_by_chance_is_its_mean_where_nothing_shifted(self) -> None:
        rng = np.random.default_rng(0)
        pairs = [[np.sort(rng.normal(size=size).astype(np.float32)) for size in (4000, 1000)] for _ in range(200)]
        found = [psi(*pair) for pair in pairs]
        # Measured: 0.01126 on average against 0.01125; the standard error of 200 draws is 0.0003.
        assert np.mean([one.value for one in found]) == pytest.approx(found[0].by_chance, rel=0.1)

    @pytest.mark.parametrize(("n", "m", "shift"), [(1000, 400, 0.0), (400, 1000, 0.3), (50, 70, 2.0), (2, 1, 0.0)])
    def test_ks_equals_scipy(self, n: int, m: int, shift: float) -> None:
        rng = np.random.default_rng(n)
        one = np.sort(rng.normal(size=n).astype(np.float32).round(1))  # with ties
        other = np.sort((rng.normal(size=m) + shift).astype(np.float32).round(1))
        expected = stats.ks_2samp(one, other, method="asymp")
        found = ks(one, other)
        assert found.distance == pytest.approx(expected.statistic, abs=1e-12)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-300)

    def test_ks_by_hand(self) -> None:
        # Below 3 lie three quarters of the one and a quarter of the other.
        assert ks(scores(0, 1, 2, 5), scores(2, 3, 4, 5)).distance == 0.5
        one = ks(scores(0), scores(1))  # for which scipy's asymptotic probability is not a number
        assert (one.distance, one.p_value) == (1, 1)

    def test_quantiles_are_numpys(self) -> None:
        values = np.sort(np.random.default_rng(0).normal(size=101).astype(np.float32))
        found = quantiles(values)
        assert found is not None
        for level, value in found.items():
            assert value == pytest.approx(float(np.quantile(values.astype(np.float64), float(level))), rel=1e-12)
        assert quantiles(scores()) is None
        assert sorted_scores([]).dtype == np.float32

    def test_alarms_name_value_and_key(self) -> None:
        rng = np.random.default_rng(0)
        before = np.sort(rng.normal(size=1000).astype(np.float32))
        shifted = np.sort((rng.normal(size=200) + 3).astype(np.float32))
        drift = Drift(compare(before, shifted), compare(before, before), Shares(30, 200), Shares(500, 1000))
        off = Thresholds(None, None, None, None, min_images=100)
        assert drift.alarms(off) == []
        found = drift.alarms(Thresholds(0.25, 0.5, 0.1, 0.2, min_images=100))
        assert [alarm.split(" is ")[0] for alarm in found[:2]] == ["PSI of the new images", "KS of the new images"]
        assert "above drift.max_psi=0.25" in found[0]
        assert found[2] == "30 of 200 new and changed images could not be used (15.0%), above drift.max_error_share=0.1"
        assert found[3] == "500 of 1,000 images of the collection are gone (50.0%), above drift.max_gone_share=0.2"
        assert len(found) == 4
        few = drift.alarms(Thresholds(0.25, 0.5, 0.1, 0.2, min_images=201))
        assert few == found[3:]
        assert compare(before, scores()) is None


@pytest.fixture
def series(tmp_path: Path) -> Series:
    return Series(Storage().open(str(tmp_path)), "model-1")


def finished_run(series: Series, tick: str, age: timedelta, results: bool = True) -> None:
    """A run folder as the job leaves it, with as many files as matter here."""
    folder = Path(series.run(tick).folder.path)
    (folder / "results").mkdir(parents=True)
    (folder / "snapshot.parquet").write_bytes(b"snapshot of " + tick.encode())
    if results:
        (folder / "results" / "part-0.parquet").write_bytes(b"rows")
    (folder / "summary.json").write_text(json.dumps({"finished_at": (START - age).isoformat()}))


def snapshot_of(series: Series, tick: str, *runs: str) -> Snapshot:
    path = series.relative(series.run(tick).folder / "snapshot.parquet")
    return Snapshot(tick, path, "digest", 3, 1, 0, 0, runs, {"max_bytes": 9}, START.isoformat())


def files(series: Series) -> set[str]:
    root = Path(series.folder.path) / "runs"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


class TestSeries:
    def test_the_state_is_read_as_written(self, series: Series) -> None:
        assert series.state() == State()
        state = State(snapshot_of(series, "t2", "t1", "t2"), "t3", "t2")
        series.write_state(state)
        assert series.state() == state
        assert state.snapshot is not None
        assert state.snapshot.error_share == 0.25
        (series.folder / "series.json").write_text('{"open": null}')
        with pytest.raises(RunError, match=r"series\.json' is not usable"):
            series.state()

    def test_publishing_replaces_the_view_and_readers_keep_what_they_opened(
        self, series: Series, tmp_path: Path
    ) -> None:
        finished_run(series, "t1", timedelta())
        finished_run(series, "t2", timedelta())
        series.publish(snapshot_of(series, "t1"), START)
        with (tmp_path / "latest.parquet").open("rb") as reader:
            series.publish(snapshot_of(series, "t2"), START + timedelta(days=1))
            assert reader.read() == b"snapshot of t1"
        assert (tmp_path / "latest.parquet").read_bytes() == b"snapshot of t2"
        assert json.loads((tmp_path / "latest.json").read_text()) == {
            "series": "model-1",
            "run_id": "t2",
            "present": 3,
            "failed": 1,
            "gone": 0,
            "finished_at": START.isoformat(),
            "snapshot": "series/model-1/runs/t2/snapshot.parquet",
            "checked_at": (START + timedelta(days=1)).isoformat(),
        }
        before = (tmp_path / "latest.parquet").stat()
        series.publish(snapshot_of(series, "t2"), START + timedelta(days=2))  # unchanged: only looked at again
        assert (tmp_path / "latest.parquet").stat().st_mtime_ns == before.st_mtime_ns
        copy(series.output / "latest.parquet", series.output / "latest.parquet")  # the same file, under a lock of one
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "latest.parquet", "series"]

    def test_pruning_takes_what_is_old_and_not_needed(self, series: Series) -> None:
        for tick, days in (("t1", 50), ("t2", 40), ("t3", 35), ("t4", 34), ("t5", 33), ("t6", 2)):
            finished_run(series, tick, timedelta(days=days))
        unfinished = Path(series.run("t7").folder.path)
        unfinished.mkdir()
        (unfinished / "draft.parquet").write_bytes(b"")
        series.write_state(State(snapshot_of(series, "t4", "t1", "t4"), "t7", "t5"))
        before = files(series)
        assert prune_all(series.output, START - timedelta(days=30)) == ["model-1/t1", "model-1/t2", "model-1/t3"]
        # t1 has rows of the newest snapshot, which is t4's; t5 is the newest run.
        assert before - files(series) == {
            "t1/snapshot.parquet",
            *(
                f"{tick}/{name}"
                for tick in ("t2", "t3")
                for name in ("snapshot.parquet", "results/part-0.parquet", "summary.json")
            ),
        }
        assert not Path(series.run("t2").folder.path).exists()
        assert prune_all(series.output, START - timedelta(days=30)) == []

    def test_pruning_never_takes_the_newest_however_old(self, series: Series) -> None:
        finished_run(series, "t1", timedelta(days=900))
        series.write_state(State(snapshot_of(series, "t1", "t1"), None, "t1"))
        assert prune_all(series.output, START) == []
        assert prune_all(Storage().open(series.output.path + "/nowhere"), START) == []

    def test_pruning_leaves_what_readers_see_and_what_a_run_compares_with(self, series: Series) -> None:
        """After a night that was not published ``latest.json`` names an older snapshot than the series."""
        for tick, days in (("t1", 50), ("t2", 40), ("t3", 35), ("t4", 1)):
            finished_run(series, tick, timedelta(days=days))
        series.publish(snapshot_of(series, "t1", "t1"), START)
        series.write_state(State(snapshot_of(series, "t4", "t4"), None, "t4"))
        other = Series(series.output, "model-2")
        before = {"snapshot": series.relative(series.run("t2").folder / "snapshot.parquet")}
        record = {"images": 0, "listed_at": START.isoformat(), "before": before}
        (other.run("u1").folder / "run.json").write_text(json.dumps(record))
        other.write_state(State(None, "u1", None))
        assert prune_all(series.output, START - timedelta(days=30)) == ["model-1/t3"]
        pointer = json.loads((series.output / "latest.json").read_bytes())
        assert (series.output / pointer["snapshot"]).exists()

    def test_an_interrupted_deletion_is_found_again(self, series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
        finished_run(series, "t1", timedelta(days=50))
        finished_run(series, "t2", timedelta())
        series.write_state(State(snapshot_of(series, "t2", "t2"), None, "t2"))
        filesystem = series.output.filesystem
        remove, left = filesystem.rm_file, iter((True, False))

        def killed(path: str) -> None:
            if not next(left):
                raise KeyboardInterrupt
            remove(path)

        with monkeypatch.context() as patch:  # the only way to be killed between two files
            patch.setattr(filesystem, "rm_file", killed)
            with pytest.raises(KeyboardInterrupt):
                series.prune(START - timedelta(days=30), set())
        assert series.prune(START - timedelta(days=30), set()) == ["t1"]
        assert not Path(series.run("t1").folder.path).exists()

    def test_names_and_ages(self) -> None:
        assert tick_of(datetime(2026, 11, 25, 2, 3, 4, 999, tzinfo=UTC)) == "20261125T020304Z"
        assert [duration(text).total_seconds() / 3600 for text in ("12h", "30d", "2w")] == [12, 720, 336]
