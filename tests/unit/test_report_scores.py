"""Scores of a run streamed from shards on disk; exact ranks and quantiles against sorting. Nothing is faked."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ais.config import GalleryConfig
from ais.errors import RunError
from ais.report import scores as module
from ais.report.scores import Scores, read_scores, shuffled
from ais.report.selection import choose
from ais.runs import write_table
from ais.storage import Storage


def book(folder: Path, values: np.ndarray, ids: np.ndarray | None = None, shard_rows: int = 1000) -> Scores:
    ids = np.arange(len(values)) if ids is None else ids
    place = Storage().open(str(folder))
    for start in range(0, len(values), shard_rows):
        part = slice(start, start + shard_rows)
        columns = {"image_id": ids[part], "score": values[part].astype(np.float32), "row": np.arange(len(values))[part]}
        spread = pa.nulls(len(columns["row"]), pa.float32())
        write_table(place / f"part-{start:07d}.parquet", pa.table(columns).append_column("score_std", spread))
    scratch = folder / "scratch"
    scratch.mkdir()
    return read_scores(place.files("*.parquet"), scratch)


SETS = {
    "normal": np.random.default_rng(0).normal(5, 1, 5003),
    "around zero": np.random.default_rng(1).normal(0, 1e-3, 5003),
    "ties": np.random.default_rng(2).integers(-3, 4, 5003),
    "wide": np.random.default_rng(3).standard_cauchy(5003) * 1e9,
    "zeros of both signs": np.array([0.0, -0.0, 0.0, -1e-45, 1e-45]),
    "one": np.array([4.25]),
}


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 777)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("name", SETS)
def test_quantiles_and_ranks_equal_sorting(tmp_path: Path, name: str) -> None:
    values = SETS[name].astype(np.float32)
    scores = book(tmp_path, values)
    shares = np.linspace(0, 1, 23)
    reference = np.sort(values)[np.rint(shares * (len(values) - 1)).astype(int)]
    np.testing.assert_array_equal(scores.quantiles(shares), reference)
    asked = values[:: max(1, len(values) // 50)]
    below, above = scores.below_and_above(asked)
    assert below.tolist() == [(values < value).sum() for value in asked]
    assert above.tolist() == [(values > value).sum() for value in asked]


@pytest.mark.usefixtures("_small_chunks")
def test_the_smallest_by_a_key_with_ties_by_id(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    values, ids = random.integers(0, 50, 3000).astype(np.float32), random.permutation(3000)
    scores = book(tmp_path, values, ids, shard_rows=512)
    assert scores.smallest(lambda _, score: -score, 100) == np.lexsort((ids, -values))[:100].tolist()
    assert scores.smallest(lambda _, score: score, 5000) == np.lexsort((ids, values)).tolist()
    # A sample is of ids: another order of the shards gives the same images.
    again = book(tmp_path / "again", values[::-1], ids[::-1], shard_rows=100)
    sample = scores.smallest(shuffled, 40)
    assert scores.ids[sample].tolist() == again.ids[again.smallest(shuffled, 40)].tolist()
    assert abs(np.mean(scores.ids[sample]) - 1500) < 4 * 866 / np.sqrt(40)


@pytest.mark.usefixtures("_small_chunks")
def test_what_is_not_finite_keeps_its_place_and_is_left_out(tmp_path: Path) -> None:
    values = np.arange(2000, dtype=np.float32)
    values[[3, 900, 1500]] = np.nan, np.inf, -np.inf
    scores = book(tmp_path, values)
    assert (scores.count, scores.undefined) == (1997, 3)
    assert scores.smallest(lambda _, score: score, 4) == [0, 1, 2, 4]
    assert scores.quantiles([0, 1]).tolist() == [0, 1999]
    assert scores.histogram(np.array([0, 1000.0, 2000])).sum() == 1997
    with pytest.raises(ValueError, match="no finite"):
        book(tmp_path / "none", np.array([np.nan])).quantiles([0.5])


def test_rows_come_in_the_order_asked_from_all_shards_and_row_groups(tmp_path: Path) -> None:
    values = np.arange(12_000, dtype=np.float32)
    scores = book(tmp_path, values, shard_rows=9000)  # a row group has 4096 rows
    asked = [11_999, 0, 4095, 4096, 8999, 9000, 4097, 1]
    assert scores.rows(asked, ["row"])["row"].to_pylist() == asked


def test_a_run_without_results(tmp_path: Path) -> None:
    scores = book(tmp_path, np.empty(0))
    assert (scores.count, scores.mean_spread) == (0, None)
    assert scores.smallest(lambda _, score: score, 3) == []


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(RunError, match=r"part-0\.parquet"):
        read_scores(Storage().open(str(tmp_path)).files(), tmp_path)


def test_images_at_quantiles_where_most_scores_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 777)
    values = np.where(np.arange(5000) % 100, 2.0, np.arange(5000) / 5000).astype(np.float32)
    ids = np.random.default_rng(5).permutation(5000)
    scores = book(tmp_path, values, ids)
    shown = choose(scores, GalleryConfig(top=0, bottom=0, sample=0, quantiles=9))
    asked = np.unique(np.sort(values)[np.rint(np.linspace(0, 1, 9) * 4999).astype(int)])
    assert not shown.everything
    assert [values[position] for position in shown.positions] == asked[::-1].tolist()
    for position in shown.positions:
        assert ids[position] == ids[values == values[position]].min()
    assert choose(scores, GalleryConfig(top=0, bottom=0, sample=0, quantiles=0)).positions == []
