"""Similarity AIS: the rank-one algebra equals the slow way, cases by hand, what is refused. Nothing is faked."""

from pathlib import Path

import numpy as np
import pytest

from ais.errors import StorageError
from ais.importance.jackknife import JackknifedAIS, jackknifed_ais
from ais.importance.matrix import read_matrix
from ais.importance.similarity import (
    SimilarityError,
    alignment,
    check_human_matrix,
    collective_ais,
    collective_ais_reference,
    collective_similarities,
    individual_ais,
    individual_ais_reference,
    individual_similarities,
    off_diagonal,
    pearson,
    similarity_of,
    upper_triangle,
)
from ais.storage import Storage


def planted_case(images: int, dimensions: int, maps: int, first: int, scale: float = 1.0):
    """Positive embeddings with a large common mean, as pooled ReLU features are; a human matrix of low rank."""
    rng = np.random.default_rng(images)
    embeddings = scale * (5 + rng.normal(size=(images, dimensions)))
    replacements = embeddings[:, first : first + maps] * rng.uniform(0, 1, (images, maps))
    human = np.corrcoef(rng.normal(size=(images, 6)))
    return embeddings, replacements, human


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_collective_equals_reference(scale):
    """Measured worst error 5e-17 of effects up to 4e-2, at scale 1 and at 1e5 (as untrained ResNets have)."""
    embeddings, replacements, human = planted_case(15, 40, 24, first=10, scale=scale)
    fast = collective_ais(embeddings, replacements, 10, human)
    slow = collective_ais_reference(embeddings, replacements, 10, human)
    assert np.abs(slow).max() > 1e-4
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_individual_equals_reference(scale):
    """Measured worst error 4e-16 at scale 1 and 6e-16 at 1e5."""
    embeddings, replacements, human = planted_case(12, 30, 20, first=5, scale=scale)
    fast = individual_ais(embeddings, replacements, 5, human)
    slow = individual_ais_reference(embeddings, replacements, 5, human)
    assert np.abs(slow).max() > 1e-4
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-12)


def test_float32_embeddings_are_not_rounded_further():
    """float32 input gives what the same numbers give in float64."""
    embeddings, replacements, human = planted_case(10, 30, 30, first=0)
    embeddings, replacements = embeddings.astype(np.float32), replacements.astype(np.float32)
    np.testing.assert_allclose(
        collective_ais(embeddings, replacements, 0, human),
        collective_ais(embeddings.astype(np.float64), replacements.astype(np.float64), 0, human),
        rtol=0,
        atol=1e-14,
    )


def test_off_diagonal():
    assert off_diagonal(np.arange(9).reshape(3, 3)).tolist() == [[1, 2], [3, 5], [6, 7]]
    matrices = np.random.default_rng(0).normal(size=(4, 2, 5, 5))
    expected = [[[np.delete(row, i) for i, row in enumerate(matrix)] for matrix in pair] for pair in matrices]
    np.testing.assert_array_equal(off_diagonal(matrices), expected)


class TestJackknife:
    @pytest.mark.parametrize(
        ("level", "reference", "parts"),
        [
            ("collective", collective_ais_reference, collective_similarities),
            ("individual", individual_ais_reference, individual_similarities),
        ],
    )
    def test_replicates_equal_the_set_without_each_image(self, level, reference, parts):
        """Measured worst error 2e-15 of AIS up to 4e-2."""
        embeddings, replacements, human = planted_case(9, 25, 12, first=4)
        np.fill_diagonal(human, np.nan)  # never read
        found = jackknifed_ais(parts(embeddings, replacements, 4), similarity_of(embeddings), human, level)
        whole = reference(embeddings, replacements, 4, human)
        np.testing.assert_allclose(found.ais, whole, rtol=0, atol=2e-14)
        for j, replicate in enumerate(found.replicates):
            kept = np.delete(np.arange(9), j)
            expected = reference(embeddings[kept], replacements[kept], 4, human[np.ix_(kept, kept)])
            np.testing.assert_allclose(replicate, np.atleast_2d(expected).mean(0), rtol=0, atol=2e-14)

    def test_by_hand(self):
        """Replicates 1, 2, 3, 4, 5 of five images: variance 4/5 · 10, 2.776 deviations each way."""
        found = JackknifedAIS(np.array([3.0]), np.arange(1.0, 6)[:, None])
        low, high = found.interval()
        assert (low[0], high[0]) == pytest.approx((3 - 2.776445 * np.sqrt(8), 3 + 2.776445 * np.sqrt(8)), rel=1e-6)

    def test_interval_covers_the_truth(self):
        """300 sets of 25 images; the truth is the AIS of 1,000. Measured for the four maps: 0.95 to 0.98."""
        rng = np.random.default_rng(0)
        mixing = rng.normal(size=(3, 8))

        def draw(count):
            hidden = rng.normal(size=(count, 3))
            embeddings = hidden @ mixing + 0.5 * rng.normal(size=(count, 8))
            human = -np.linalg.norm(hidden[:, None] - hidden, axis=2)
            return embeddings, np.zeros((count, 4)), human

        embeddings, replacements, human = draw(1000)
        truth = collective_ais(embeddings, replacements, 0, human)
        covered = np.zeros(4)
        for _ in range(300):
            embeddings, replacements, human = draw(25)
            parts = collective_similarities(embeddings, replacements, 0)
            low, high = jackknifed_ais(parts, similarity_of(embeddings), human, "collective").interval()
            covered += (low < truth) & (truth < high)
        assert ((covered / 300 > 0.92) & (covered / 300 < 0.995)).all()

    def test_too_few_images_have_no_interval(self):
        embeddings, replacements, human = planted_case(4, 10, 3, first=0)
        found = jackknifed_ais(
            collective_similarities(embeddings, replacements, 0), similarity_of(embeddings), human, "collective"
        )
        assert np.isnan(found.interval()).all()


def test_a_map_that_carries_the_judgment_scores_highest():
    """People judge by one hidden property; map 0 measures it, the others are noise."""
    rng = np.random.default_rng(0)
    judged = rng.normal(size=20)
    human = -np.abs(judged[:, None] - judged)
    embeddings = rng.normal(size=(20, 16))
    embeddings[:, 0] = 6 * judged
    replacements = np.zeros((20, 16))
    ais = collective_ais(embeddings, replacements, 0, human)
    assert ais.argmax() == 0
    assert ais[0] > 0.1
    assert individual_ais(embeddings, replacements, 0, human).mean(0).argmax() == 0


def test_an_unchanged_map_has_no_importance():
    embeddings, replacements, human = planted_case(8, 20, 4, first=3)
    replacements[:, 2] = embeddings[:, 5]
    assert collective_ais(embeddings, replacements, 3, human)[2] == pytest.approx(0, abs=1e-14)
    assert individual_ais(embeddings, replacements, 3, human)[:, 2] == pytest.approx(0, abs=1e-14)


def test_pearson_by_hand():
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 7.0])) == pytest.approx(0.9933992677987828)
    assert pearson(np.array([1.0, 1.0, 1.0]), np.array([2.0, 4.0, 7.0])) == 0
    assert upper_triangle(np.array([[0, 1, 2], [9, 0, 3], [9, 9, 0]])).tolist() == [1, 2, 3]


def test_nan_is_no_correlation_of_zero():
    assert np.isnan(pearson(np.array([1.0, np.nan, 3.0]), np.array([2.0, 4.0, 7.0])))
    embeddings, replacements, human = planted_case(8, 20, 4, first=3)
    replacements[5, 2] = np.nan
    for ais in (collective_ais, individual_ais):
        found = np.atleast_2d(ais(embeddings, replacements, 3, human))[-3:][0]  # of image 5, or of all
        assert np.isnan(found).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("value", "message"), [(2.0, "same in all coordinates"), (np.nan, "not finite")])
def test_an_embedding_that_correlates_with_nothing_is_refused(value, message):
    embeddings, replacements, human = planted_case(8, 20, 4, first=3)
    embeddings[6] = value
    for ais in (collective_ais, individual_ais):
        with pytest.raises(SimilarityError, match=f"image 6 .*{message}"):
            ais(embeddings, replacements, 3, human)


def test_what_ablation_leaves_constant_correlates_with_nothing():
    """Of the embedding of image 0 only map 0 is not zero."""
    embeddings, replacements, _ = planted_case(8, 4, 4, first=0)
    embeddings[0] = [5, 0, 0, 0]
    for parts in (collective_similarities, individual_similarities):
        with np.errstate(all="raise"):
            (found,) = parts(embeddings, np.zeros_like(replacements), 0)
        np.testing.assert_allclose(found[0, 0, 1:], 0, rtol=0, atol=1e-6)


def test_alignment_is_numpys():
    embeddings, _, human = planted_case(7, 11, 1, first=0)
    rows, columns = np.triu_indices(7, 1)
    expected = np.corrcoef(np.corrcoef(embeddings)[rows, columns], human[rows, columns])[0, 1]
    assert alignment(embeddings, human) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("spoil", "images", "message"),
    [
        (lambda h: h[:3], 4, r"shape \(3, 4\).*square"),
        (lambda h: h, 5, "of 4 images, the list has 5"),
        (lambda h: h[:2, :2], 2, "at least 3"),
        (lambda h: np.where(np.arange(16).reshape(4, 4) == 6, np.nan, h), 4, "not finite at row 1, column 2"),
        (lambda h: np.where(np.arange(16).reshape(4, 4) == 9, np.nan, h), 4, "not finite at row 2, column 1"),
        (lambda h: h + np.triu(np.ones((4, 4)), 1), 4, "not symmetric: .* at row 0, column 1"),
        (lambda h: np.full_like(h, 0.5), 4, "all human similarities are 0.5"),
    ],
)
def test_refused(spoil, images, message):
    human = np.corrcoef(np.random.default_rng(1).normal(size=(4, 9)))
    with pytest.raises(SimilarityError, match=message):
        check_human_matrix(spoil(human), images)


def test_the_diagonal_may_be_anything():
    human = np.corrcoef(np.random.default_rng(1).normal(size=(4, 9)))
    np.fill_diagonal(human, np.nan)
    assert check_human_matrix(human, 4).dtype == np.float64


def test_files_that_hold_no_matrix(tmp_path: Path) -> None:
    """Damaged, of another kind, or not of numbers: each reader raises errors of its own."""
    values = np.random.default_rng(0).random((60, 60))
    np.save(tmp_path / "whole.npy", values)
    np.savez_compressed(tmp_path / "whole.npz", matrix=values)
    array, archive = ((tmp_path / f"whole.{kind}").read_bytes() for kind in ("npy", "npz"))
    np.save(tmp_path / "text.npy", np.array([["a", "b", "c"]] * 3))
    np.savez(tmp_path / "complex.npz", matrix=values * 1j)
    text, numbers = (tmp_path / "text.npy").read_bytes(), (tmp_path / "complex.npz").read_bytes()
    for name, data, said in (
        ("m.npy", b"", "cannot be read: it is no array of NumPy"),
        ("m.npy", archive, "cannot be read: it is no array of NumPy"),
        ("m.npy", array[:-9], "cannot be read"),
        ("m.npy", text, "holds <U1, not numbers; save it again"),
        ("m.npz", b"", "cannot be read: it is no archive of arrays"),
        ("m.npz", array, "cannot be read: it is no archive of arrays"),
        ("m.npz", archive[:-99], "cannot be read: File is not a zip file"),
        ("m.npz", archive[:999] + bytes(99) + archive[1098:], "cannot be read: Bad CRC-32"),
        ("m.npz", numbers, "holds complex128, not numbers"),
        ("m.csv", b"1," + b"2" * 200_000, "cannot be read: field larger than field limit"),
        ("m.csv", "Größe,1\n".encode("latin-1"), "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SimilarityError, match=said):
            read_matrix(str(tmp_path / name), Storage())
    with pytest.raises(SimilarityError, match="does not exist"):
        read_matrix(str(tmp_path / "m.csv" / "m.npy"), Storage())
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(StorageError, match=r"folder\.npy' cannot be read: IsADirectoryError"):
        read_matrix(str(tmp_path / "folder.npy"), Storage())
