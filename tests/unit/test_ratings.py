"""The table of ratings: what is read from it, and every reason for refusing it. Nothing is faked."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ais.config import RatingsConfig
from ais.errors import RatingsError, StorageError
from ais.ratings import Ratings, held_out_images, read_ratings
from ais.storage import Storage

ROWS = [(f"{index:02d}.png", str(index / 4)) for index in range(12)]


def write_csv(folder: Path, rows: list[tuple[str, ...]], header: str = "image,score") -> str:
    path = folder / "ratings.csv"
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


def read(path: str, **options: object) -> Ratings:
    return read_ratings(RatingsConfig(path=path, **options), Storage())  # type: ignore[arg-type]


def changed(row: int, *values: str) -> list[tuple[str, ...]]:
    """ROWS with one row, counted from 1, replaced."""
    return [*ROWS[: row - 1], values, *ROWS[row:]]


def with_splits(words: list[str]) -> list[tuple[str, ...]]:
    return [(*row, word) for row, word in zip(ROWS, words, strict=True)]


def test_csv_relative_to_its_folder(tmp_path: Path) -> None:
    ratings = read(write_csv(tmp_path, ROWS))
    assert ratings.images.tolist() == [image for image, _ in ROWS]
    assert ratings.addresses.tolist() == [str(tmp_path / image) for image, _ in ROWS]
    assert ratings.scores.tolist() == [index / 4 for index in range(12)]
    assert (ratings.splits, ratings.rows, ratings.skipped, ratings.averaged) == (None, 12, 0, 0)


def test_parquet_other_columns_root_and_splits(tmp_path: Path) -> None:
    words = ["Train"] * 6 + ["val", "validation", " test ", "TEST", "train", "train"]
    table = {
        "file": [image for image, _ in ROWS],
        "beauty": pa.array(range(12), pa.int8()),
        "part": words,
        "rest": words,
    }
    pq.write_table(pa.table(table), tmp_path / "ratings.parquet")
    ratings = read(
        str(tmp_path / "ratings.parquet"),
        image_column="file",
        score_column="beauty",
        split_column="part",
        root="s3://bucket/images/",
    )
    assert ratings.addresses[3] == "s3://bucket/images/03.png"
    assert ratings.scores.tolist() == list(range(12))
    assert ratings.splits is not None
    assert ratings.splits.tolist() == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2 + ["train"] * 2


def test_byte_order_mark_and_quotes(tmp_path: Path) -> None:
    path = Path(write_csv(tmp_path, changed(2, '"a, b.png"', " 7.5 ")))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ratings = read(str(path))
    assert ratings.images[1] == "a, b.png"
    assert ratings.scores[1] == 7.5


def test_decimals_after_many_integers(tmp_path: Path) -> None:
    rows = [(f"{index:07d}.png", "1") for index in range(100_000)] + [("last.png", "2.5")]
    ratings = read(write_csv(tmp_path, rows))
    assert len(ratings) == 100_001
    assert ratings.scores[-1] == 2.5


@pytest.mark.parametrize("gap", ["", "nan", "NA", "inf", "-inf"])
def test_missing_scores_refused_or_counted(tmp_path: Path, gap: str) -> None:
    path = write_csv(tmp_path, changed(3, "02.png", gap))
    with pytest.raises(RatingsError, match=r"column 'score': row 3 has .*missing=skip"):
        read(path)
    ratings = read(path, missing="skip")
    assert (len(ratings), ratings.rows, ratings.skipped) == (11, 12, 1)
    assert "02.png" not in ratings.images


def test_duplicates_refused_or_averaged(tmp_path: Path) -> None:
    path = write_csv(tmp_path, [*ROWS, ("./03.png", "2"), (str(tmp_path / "03.png"), "4")])
    with pytest.raises(RatingsError, match=r"row 13 has '\./03\.png', row 14 .*duplicates=mean"):
        read(path)
    ratings = read(path, duplicates="mean")
    assert (len(ratings), ratings.rows, ratings.averaged) == (12, 14, 2)
    assert ratings.scores[3] == pytest.approx((0.75 + 2 + 4) / 3)
    assert ratings.scores[4] == 1.0


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    rows = [*with_splits(["train"] * 9 + ["test"] * 3), ("00.png", "3", "test")]
    with pytest.raises(RatingsError, match="row 13 has 'test': in another split"):
        read(write_csv(tmp_path, rows, "image,score,split"), duplicates="mean")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, "image,scores", "no column 'score', it has 'image', 'scores'; did you mean ratings.score_column=scores"),
        (ROWS, "image;score", "expected|Expected"),
        ([("a.png;1",)] * 12, "image;score", "separate the columns by commas"),
        (ROWS, "image,image", "2 columns 'image'|no column 'score'"),
        ([], "image,score", "a header and no rows"),
        (changed(4, "03.png", "good"), "image,score", "row 4 has 'good': not a number"),
        (changed(4, "03.png", "1_000"), "image,score", "row 4 has '1_000': not a number"),
        (changed(4, "", "1"), "image,score", "column 'image': row 4 has '': no address"),
        ([(image, "3") for image, _ in ROWS], "image,score", "all 12 images have the score 3"),
        (ROWS[:9], "image,score", "rates 9 images; at least 10"),
        (with_splits(["train"] * 11 + ["dev"]), "image,score,split", "row 12 has 'dev': no split"),
        (with_splits(["train"] * 12), "image,score,split", "no row says 'test', found 12 train"),
        (with_splits(["test"] * 11 + ["val"]), "image,score,split", "no row says 'train'"),
    ],
)
def test_refused(tmp_path: Path, rows: list[tuple[str, ...]], header: str, message: str) -> None:
    with pytest.raises(RatingsError, match=message):
        read(write_csv(tmp_path, rows, header))


def test_many_wrong_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(RatingsError, match="row 5 has 'bad' and 7 more rows: not a number"):
        read(write_csv(tmp_path, [(image, "bad") for image, _ in ROWS]))


@pytest.mark.parametrize("name", ["absent.csv", "ratings.parquet"])
def test_unreadable_table(tmp_path: Path, name: str) -> None:
    (tmp_path / "ratings.parquet").write_bytes(b"no parquet")
    with pytest.raises(RatingsError, match=f"{name}.* cannot be read"):
        read(str(tmp_path / name))


def test_a_header_of_another_encoding(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,{number},x\n" for number in range(12))
    (tmp_path / "latin.csv").write_text(f"image,score,Größe\n{rows}", "latin-1")
    with pytest.raises(RatingsError, match=r"latin\.csv' cannot be read as a table of ratings: .*in UTF-8"):
        read(str(tmp_path / "latin.csv"))


def test_predictions_that_do_not_name_the_test_split(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.parquet"
    pq.write_table(pa.table({"image": [f"{number}.png" for number in range(99)]}), predictions)
    whole = predictions.read_bytes()
    for damaged in (b"", whole[:-9], whole[:40] + bytes(99) + whole[139:]):
        predictions.write_bytes(damaged)
        with pytest.raises(RatingsError, match=r"predictions\.parquet' does not name the images of a test split"):
            held_out_images(str(tmp_path), Storage())
    pq.write_table(pa.table({"uri": ["1.png"]}), predictions)
    with pytest.raises(RatingsError, match=r"does not name .*; copy the head's bundle whole"):
        held_out_images(str(tmp_path), Storage())
    predictions.unlink()
    with pytest.raises(RatingsError, match=r"does not say which images .*held_out=false"):
        held_out_images(str(predictions), Storage())
    predictions.mkdir()
    with pytest.raises(StorageError, match=r"predictions\.parquet' cannot be read: IsADirectoryError"):
        held_out_images(str(tmp_path), Storage())


@pytest.mark.parametrize("image", ["../secret.png", "a/../../secret.png"])
def test_relative_address_out_of_the_root(tmp_path: Path, image: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = write_csv(inner, changed(2, image, "1"))
    with pytest.raises(RatingsError, match=r"row 2 has .*outside of .*allow_outside_root"):
        read(path)
    assert read(path, allow_outside_root=True).addresses[1] == str(tmp_path / "secret.png")


@pytest.mark.parametrize("image", ["/elsewhere/1.png", "s3://bucket/1.png"])
def test_absolute_address_is_bound_only_by_a_given_root(tmp_path: Path, image: str) -> None:
    path = write_csv(tmp_path, changed(2, image, "1"))
    assert read(path).addresses[1] == image
    with pytest.raises(RatingsError, match=r"row 2 has .*outside of"):
        read(path, root=str(tmp_path))
    assert read(path, root=str(tmp_path), allow_outside_root=True).addresses[1] == image


def test_escapes_mean_something_on_the_web_only(tmp_path: Path) -> None:
    path = write_csv(tmp_path, changed(2, "%2e%2e/secret.png", "1"))
    assert read(path).addresses[1] == str(tmp_path / "%2e%2e" / "secret.png")
    with pytest.raises(RatingsError, match=r"row 2 has .*outside of"):
        read(path, root="https://host/images")


def test_a_table_elsewhere_names_no_files_of_this_machine() -> None:
    memory = Storage().open("memory://ratings/table.csv")
    memory.write_text("\n".join(["image,score", *(f"/etc/{number},{number}" for number in range(12))]))
    with pytest.raises(RatingsError, match=r"row 1 has '/etc/0'.*outside of"):
        read("memory://ratings/table.csv")
    assert read("memory://ratings/table.csv", root="/etc").addresses[1] == "/etc/1"
    assert read("memory://ratings/table.csv", allow_outside_root=True).addresses[0] == "/etc/0"
    memory.remove()


def test_neighbour_with_the_roots_name_as_prefix_is_outside(tmp_path: Path) -> None:
    path = write_csv(tmp_path, changed(2, "../images2/1.png", "1"))
    with pytest.raises(RatingsError, match="outside"):
        read(path, root=str(tmp_path / "images"))


def test_order_is_that_of_the_table(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(12)
    ratings = read(write_csv(tmp_path, [ROWS[index] for index in order]))
    assert (ratings.scores * 4).tolist() == order.tolist()
