"""Data sets as they are published, in small: the tests write files of the same shape. Nothing is faked."""

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from ais.config import ConvertConfig, RatingsConfig
from ais.datasets import Compared, Rated, read_dataset
from ais.errors import AisError, ConfigError, DatasetError
from ais.importance.matrix import read_matrix
from ais.ratings import read_ratings
from ais.settings import parse_config
from ais.storage import Storage
from jobs.convert import main

STORAGE = Storage()
SETS_HEADER = "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set"
SCORES_HEADER = "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,MOS_zscore"


def read(dataset: str, source: Path, **options: str) -> Rated | Compared:
    output = "matrix.npz" if dataset == "peterson" else "ratings.csv"
    pairs = {"dataset": dataset, "source": str(source), "output": output, **options}
    return read_dataset(parse_config(ConvertConfig, "", [f"{key}={value}" for key, value in pairs.items()]), STORAGE)


def refusal(dataset: str, source: Path, **options: str) -> str:
    with pytest.raises(AisError) as caught:
        read(dataset, source, **options)
    return str(caught.value)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def ava(tmp_path: Path) -> Path:
    """Twelve images, ten of them in the lists."""
    root = tmp_path / "AVA_dataset"
    lists = root / "aesthetics_image_lists"
    lists.mkdir(parents=True)
    votes = np.random.default_rng(0).integers(0, 60, (12, 10))
    ids = [953619 + 7 * row for row in range(12)]
    lines = [f"{row + 1} {ids[row]} {' '.join(map(str, votes[row]))} 1 22 1396" for row in range(12)]
    (root / "AVA.txt").write_text("\n".join(lines) + "\n")
    (lists / "generic_ls_train.jpgl").write_text("\n".join(map(str, ids[:7])) + "\n")
    (lists / "generic_test.jpgl").write_text("\n".join(map(str, ids[7:10])) + "\n")
    return root


@pytest.fixture
def koniq(tmp_path: Path) -> Path:
    """Twelve images of ids of other lengths, with the file of the sets; scores of the published file."""
    root = tmp_path / "koniq10k"
    root.mkdir()
    sets = ["training"] * 8 + ["validation"] * 2 + ["test"] * 2
    rows = [
        f"{10004473376 + row}.jpg,0.0,0.0,0.238,0.695,0.067,105,{77.38 - row},0.527,{sets[row]}" for row in range(12)
    ]
    (root / "koniq10k_distributions_sets.csv").write_text("\n".join([SETS_HEADER, *rows]) + "\n")
    return root


@pytest.fixture
def aigciqa(tmp_path: Path) -> Path:
    """Twelve images and the three files of scores."""
    root = tmp_path / "AIGCIQA2023"
    (root / "DATA" / "MOS").mkdir(parents=True)
    for number in (1, 2, 3):
        scores = np.linspace(20, 70, 12)[:, None] + number
        scipy.io.savemat(root / "DATA" / "MOS" / f"mosz{number}.mat", {"MOSz": scores}, do_compression=True)
    for index in range(12):
        picture(root / "Image" / "allimg" / f"{index}.png")
    return root


@pytest.fixture
def peterson(tmp_path: Path) -> Path:
    """One category of five images whose numbers are padded, so that there is one order."""
    root = tmp_path / "fruits"
    (root / "sim_judgements").mkdir(parents=True)
    half = np.random.default_rng(0).uniform(0, 10, (5, 5))
    matrix = (half + half.T) / 2
    np.fill_diagonal(matrix, 10)
    scipy.io.savemat(root / "sim_judgements" / "fruits_simMatrix.mat", {"simMatrix": matrix, "participants": 3})
    for index in range(5):
        picture(root / "images" / f"fruit{index + 8:02}.jpg")
    return root


class TestAva:
    def test_scores_are_mean_votes_and_the_lists_are_the_split(self, ava: Path) -> None:
        rated = read("ava", ava)
        fields = [list(map(int, line.split())) for line in (ava / "AVA.txt").read_text().splitlines()]
        assert rated.names == [f"{row[1]}.jpg" for row in fields[:10]]
        expected = [
            sum(vote * count for vote, count in enumerate(row[2:12], 1)) / sum(row[2:12]) for row in fields[:10]
        ]
        np.testing.assert_allclose(rated.scores, expected, rtol=1e-15)
        assert rated.splits == ["train"] * 7 + ["test"] * 3
        assert rated.notes == ("2 images are in neither list, and left out",)

    def test_without_lists_there_is_no_split(self, ava: Path) -> None:
        for path in (ava / "aesthetics_image_lists").iterdir():
            path.unlink()
        rated = read("ava", ava / "AVA.txt")
        assert len(rated.names) == 12
        assert rated.splits is None
        assert "none published" in rated.describe(parse_config(ConvertConfig, "dataset: ava\nsource: s\noutput: r.csv"))

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("3 953633 1 2 3", "5 fields instead of 15"),
            ("3 953633 1 2 3 4 5 6 7 8 9 1.5 1 22 1396", "not all of its fields are whole numbers"),
            ("3 953633 1 2 3 4 5 6 7 8 9 -1 1 22 1396", "not all of its fields are whole numbers"),
            (f"3 953633 1 2 3 4 5 6 7 8 9 {'9' * 30} 1 22 1396", "a number of more than 15 digits"),
            ("3 953619 1 2 3 4 5 6 7 8 9 10 1 22 1396", "image 953619 has a line before"),
            ("3 953633 0 0 0 0 0 0 0 0 0 0 1 22 1396", "nobody voted"),
        ],
    )
    def test_a_bad_line_is_named(self, ava: Path, line: str, reason: str) -> None:
        lines = (ava / "AVA.txt").read_text().splitlines()
        lines[2] = line
        (ava / "AVA.txt").write_text("\n".join(lines))
        message = refusal("ava", ava)
        assert message.startswith(f"'{ava}/AVA.txt', line 3, '{line[:40]}")
        assert reason in message

    def test_lists_that_do_not_fit(self, ava: Path) -> None:
        lists = ava / "aesthetics_image_lists"
        (lists / "generic_test.jpgl").write_text("12\n")
        assert "generic_test.jpgl', line 1, '12': AVA.txt has no image 12" in refusal("ava", ava)
        (lists / "generic_test.jpgl").write_text("953619\n")
        assert "line 1, '953619': image 953619 is in the training list too" in refusal("ava", ava)
        (lists / "generic_test.jpgl").unlink()
        assert "has one list of two, generic_ls_train.jpgl" in refusal("ava", ava)


class TestKoniq10k:
    def test_the_file_of_the_sets(self, koniq: Path) -> None:
        rated = read("koniq10k", koniq)
        assert rated.names[0] == "10004473376.jpg"
        assert rated.scores[0] == 77.38
        assert rated.splits == ["train"] * 8 + ["validation"] * 2 + ["test"] * 2

    def test_the_other_file_gives_the_same_scores_and_no_split(self, koniq: Path) -> None:
        rows = (koniq / "koniq10k_distributions_sets.csv").read_text().splitlines()[1:]
        fields = [row.split(",") for row in rows]
        other = [",".join([*row[:7], "3.83", row[8], row[7]]) for row in fields]
        path = koniq / "koniq10k_scores_and_distributions.csv"
        path.write_text("\n".join([SCORES_HEADER, *other]) + "\n")
        rated = read("koniq10k", path)
        assert rated.scores.tolist() == read("koniq10k", koniq).scores.tolist()
        assert rated.splits is None

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("2.jpg,0,0,0,1,0,105,n/a,0.5,training", "the score is 'n/a', not a finite number"),
            ("2.jpg,0,0,0,1,0,105,inf,0.5,training", "the score is 'inf', not a finite number"),
            ("2.jpg,0,0,0,1,0,105,70", "8 fields instead of 10"),
            ("2.jpg,0,0,0,1,0,105,70,0.5,holdout", "set is 'holdout', not training, validation or test"),
            ("../2.jpg,0,0,0,1,0,105,70,0.5,test", "is no file name"),
            ("10004473376.jpg,0,0,0,1,0,105,70,0.5,test", "has a line before"),
        ],
    )
    def test_a_bad_line_is_named(self, koniq: Path, line: str, reason: str) -> None:
        path = koniq / "koniq10k_distributions_sets.csv"
        lines = path.read_text().splitlines()
        lines[3] = line
        path.write_text("\n".join(lines))
        message = refusal("koniq10k", koniq)
        assert message.startswith(f"'{path}', line 4, ")
        assert reason in message

    def test_another_file_is_refused_with_its_columns(self, koniq: Path) -> None:
        path = koniq / "mine.csv"
        path.write_text("image,score\n1.jpg,3\n")
        assert "has no column 'image_name', it has 'image', 'score'" in refusal("koniq10k", path)
        path.write_text("image_name,MOS\n1.jpg,3\n")
        assert "the scale of its 'MOS' is not known" in refusal("koniq10k", path)
        path.write_text(SETS_HEADER + "\n")
        assert "a header and no lines" in refusal("koniq10k", path)
        path.write_bytes(b"\xff\xfe\x00")
        assert "is not text" in refusal("koniq10k", path)


class TestAigciqa2023:
    def test_each_aspect_and_the_images(self, aigciqa: Path) -> None:
        for number, aspect in enumerate(("quality", "authenticity", "correspondence"), 1):
            rated = read("aigciqa2023", aigciqa, aspect=aspect)
            np.testing.assert_array_equal(rated.scores, np.linspace(20, 70, 12) + number)
            assert rated.names[:2] == ["0.png", "1.png"]
            assert rated.images.address == str(aigciqa / "Image" / "allimg")
        assert read("aigciqa2023", aigciqa).scale == "mean opinion score of quality"

    def test_hdf5_of_matlab_7_3_is_refused_with_the_way_out(self, aigciqa: Path) -> None:
        path = aigciqa / "DATA" / "MOS" / "mosz1.mat"
        path.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n")
        assert "version 7.3, which is HDF5 and not read here" in refusal("aigciqa2023", aigciqa)
        assert "'-v7'" in refusal("aigciqa2023", aigciqa)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ({"MOS": np.ones((12, 1))}, "one variable that matches '^MOSz$'; its variables: MOS"),
            ({"MOSz": np.ones((3, 4))}, "MOSz has the shape (3, 4)"),
            ({"MOSz": np.array([[1.0], [np.nan]])}, "MOSz is nan for image 1.png"),
            ({"MOSz": "words"}, "not numbers"),
            ({"MOSz": np.array([["a cell"]], dtype=object)}, "not numbers"),
        ],
    )
    def test_other_contents(self, aigciqa: Path, content: dict[str, object], reason: str) -> None:
        scipy.io.savemat(aigciqa / "DATA" / "MOS" / "mosz1.mat", content)
        assert reason in refusal("aigciqa2023", aigciqa)

    def test_damaged_files_are_refused(self, aigciqa: Path) -> None:
        path = aigciqa / "DATA" / "MOS" / "mosz1.mat"
        whole = path.read_bytes()
        random = np.random.default_rng(0)
        for length in (0, 4, 127, 140, len(whole) - 20):
            path.write_bytes(whole[:length])
            refusal("aigciqa2023", aigciqa)
        for _ in range(200):  # any outcome but a crash or a foreign exception
            data = bytearray(whole)
            data[random.integers(116, len(data))] = random.integers(256)
            path.write_bytes(data)
            with contextlib.suppress(DatasetError):
                read("aigciqa2023", aigciqa)

    def test_a_variable_that_claims_a_terabyte_is_refused_before_it_is_read(self, aigciqa: Path) -> None:
        path = aigciqa / "DATA" / "MOS" / "mosz1.mat"
        header = path.read_bytes()[:128]
        flags = struct.pack("<IIII", 6, 8, 6, 0)
        dimensions = struct.pack("<IIii", 5, 8, 2**20, 2**17)
        name = struct.pack("<II", 1, 4) + b"MOSz".ljust(8, b"\0")
        body = flags + dimensions + name + struct.pack("<II", 9, 8) + b"\0" * 8
        packed = zlib.compress(struct.pack("<II", 14, len(body)) + body)
        path.write_bytes(header + struct.pack("<II", 15, len(packed)) + packed)
        assert "MOSz has the shape (1048576, 131072), more than" in refusal("aigciqa2023", aigciqa)

    def test_the_file_of_another_aspect_is_refused(self, aigciqa: Path) -> None:
        message = refusal("aigciqa2023", aigciqa / "DATA" / "MOS" / "mosz3.mat")
        assert "'mosz3.mat' is not mosz1.mat, which holds aspect=quality" in message


class TestPeterson:
    def test_matrix_and_order(self, peterson: Path) -> None:
        compared = read("peterson", peterson)
        expected = scipy.io.loadmat(peterson / "sim_judgements" / "fruits_simMatrix.mat")["simMatrix"]
        np.testing.assert_array_equal(compared.matrix, expected)
        assert compared.addresses == [str(peterson / "images" / f"fruit{number:02}.jpg") for number in range(8, 13)]

    def test_an_order_that_could_be_two_is_not_guessed(self, peterson: Path) -> None:
        for index, number in enumerate((8, 9, 10, 11, 12)):
            (peterson / "images" / f"fruit{index + 8:02}.jpg").rename(peterson / "images" / f"f{number}.jpg")
        message = refusal("peterson", peterson)
        assert "row 1 of the matrix may be 'f10.jpg' (order=name) or 'f8.jpg' (order=number)" in message
        by_number = read("peterson", peterson, order="number")
        assert [Path(address).name for address in by_number.addresses] == [f"f{n}.jpg" for n in (8, 9, 10, 11, 12)]
        by_name = read("peterson", peterson, order="name")
        assert [Path(address).name for address in by_name.addresses] == [f"f{n}.jpg" for n in (10, 11, 12, 8, 9)]
        names = peterson / "order.csv"
        names.write_text("uri\n" + "\n".join(f"images/f{number}.jpg" for number in (12, 8, 10, 9, 11)) + "\n")
        listed = read("peterson", peterson, images=str(names))
        assert [Path(address).name for address in listed.addresses] == [f"f{n}.jpg" for n in (12, 8, 10, 9, 11)]

    def test_a_matrix_alone(self, peterson: Path, tmp_path: Path) -> None:
        matrix = read("peterson", peterson).matrix
        np.save(tmp_path / "rsm.npy", matrix)
        images = str(peterson / "images")
        np.testing.assert_array_equal(read("peterson", tmp_path / "rsm.npy", images=images).matrix, matrix)
        (tmp_path / "bare").mkdir()
        np.save(tmp_path / "bare" / "rsm.npy", matrix)
        assert "set images to the folder of its pictures" in refusal("peterson", tmp_path / "bare" / "rsm.npy")

    def test_what_does_not_fit(self, peterson: Path) -> None:
        (peterson / "images" / "fruit08.jpg").unlink()
        assert "the human matrix is of 5 images, the list has 4" in refusal("peterson", peterson)
        (peterson / "images" / "a1b2.jpg").touch()
        assert "'a1b2.jpg' in" in refusal("peterson", peterson, order="number")
        (peterson / "sim_judgements" / "other_sim.mat").touch()
        assert "it holds fruits_simMatrix.mat, other_sim.mat" in refusal("peterson", peterson)


class TestJob:
    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_ratings_are_what_training_reads(
        self, koniq: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for row in range(12):
            picture(koniq / "1024x768" / f"{10004473376 + row}.jpg")
        output = tmp_path / f"ratings.{suffix}"
        assert main(["dataset=koniq10k", f"source={koniq}", f"output={output}"]) == 0
        assert capsys.readouterr().out.splitlines()[1:4] == [
            "rated       12 images, 66.38 to 77.38, mean 71.88 (mean opinion score, 1 to 100)",
            "split       8 train, 2 validation, 2 test, as published",
            f"images      {koniq}/1024x768",
        ]
        ratings = read_ratings(RatingsConfig(path=str(output)), STORAGE)
        assert ratings.addresses.tolist() == [str(koniq / "1024x768" / name) for name in read("koniq10k", koniq).names]
        np.testing.assert_array_equal(ratings.scores, read("koniq10k", koniq).scores)
        assert ratings.splits.tolist() == read("koniq10k", koniq).splits

    @pytest.mark.parametrize("suffix", ["npz", "csv"])
    def test_a_matrix_is_what_importance_reads(
        self, peterson: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / f"matrix.{suffix}"
        assert main(["dataset=peterson", f"source={peterson}", f"output={output}"]) == 0
        assert "order       fruit08.jpg, fruit09.jpg … fruit12.jpg" in capsys.readouterr().out
        matrix, images = read_matrix(str(output), STORAGE)
        compared = read("peterson", peterson)
        np.testing.assert_array_equal(matrix, compared.matrix)
        assert images == compared.addresses

    def test_images_that_are_not_there(self, aigciqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (aigciqa / "Image" / "allimg" / "3.png").unlink()
        usual = ["dataset=aigciqa2023", f"source={aigciqa}", f"output={tmp_path}/r.parquet"]
        with pytest.raises(DatasetError, match=r"1 of 12 rated images are not in .*, the first '3.png'; missing=skip"):
            main(usual)
        assert main([*usual, "missing=skip"]) == 0
        assert "note        1 rated images are not there and left out, the first 3.png" in capsys.readouterr().out
        table = pq.read_table(tmp_path / "r.parquet")
        assert table.num_rows == 11
        assert "3.png" not in {Path(image).name for image in table["image"].to_pylist()}
        with pytest.raises(DatasetError, match=r"12 of 12 .* set images to their folder"):
            main([*usual, "missing=skip", f"images={tmp_path}"])

    def test_a_lost_quotation_mark(self, koniq: Path) -> None:
        """A CSV reader takes all that follows for one field."""
        published = next(koniq.glob("*.csv"))
        header, *lines = published.read_text().splitlines()
        published.write_text("\n".join([header, '"' + lines[0], *lines * 400]) + "\n")
        assert "field larger than field limit" in refusal("koniq10k", koniq)

    def test_what_is_there_is_not_replaced(self, koniq: Path, tmp_path: Path) -> None:
        """Least of all the published file itself."""
        published = next(koniq.glob("*.csv"))
        before = published.read_bytes()
        with pytest.raises(ConfigError, match=r"output: .* exists and holds something else; give another output"):
            main(["dataset=koniq10k", f"source={koniq}", f"output={published}"])
        assert published.read_bytes() == before
        for _ in range(2):
            assert main(["dataset=koniq10k", f"source={koniq}", f"output={tmp_path}/r.csv"]) == 0

    def test_a_dry_run_writes_nothing(self, ava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "ratings.csv"
        assert main(["dataset=ava", f"source={ava}", f"output={output}", "--dry-run"]) == 0
        assert "file names only: set ratings.root to their folder" in capsys.readouterr().out
        assert not output.exists()

    def test_sources_that_are_not_there(self, tmp_path: Path) -> None:
        assert "does not exist; give the folder of the unpacked data set" in refusal("ava", tmp_path / "none")
        assert "has no AVA.txt or AVA_dataset/AVA.txt; it has nothing" in refusal("ava", tmp_path)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            (["aspect=quality"], 'aspect: "quality" goes only with dataset=aigciqa2023'),
            (["order=name"], 'order: "name" goes only with dataset=peterson'),
            (["output=r.npz"], 'output: "r.npz" has to end with .csv or .parquet'),
            (["dataset=peterson", "output=r.parquet"], 'output: "r.parquet" has to end with .npz or .csv'),
            (["dataset=koniq"], "did you mean koniq10k?"),
        ],
    )
    def test_impossible_configurations(self, changes: list[str], reason: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config(ConvertConfig, "", ["dataset=ava", "source=s", "output=r.csv", *changes])
        assert reason in str(caught.value)
