"""The regression head, its ensemble and its bundle on disk. Nothing is faked; the backbone is tests/tiny.py."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from ais import load_head
from ais.backbones import Backbone, embedding_fingerprint, load_backbone
from ais.config import RatingsConfig
from ais.errors import HeadError, StorageError
from ais.heads import HeadEnsemble, RegressionHead, as_ensemble, check_belongs, read_record, save_head
from ais.ratings import read_ratings
from ais.storage import Storage
from tests import tiny  # noqa: F401 - registers the backbone


def head_with(seed: int, **arguments: Any) -> RegressionHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RegressionHead(8, hidden=5, **arguments)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny", weights="random", seed=0)


@pytest.fixture
def ensemble() -> HeadEnsemble:
    heads = [head_with(seed, dropout=0.25, target_mean=4 + seed, target_std=0.5 + seed) for seed in range(3)]
    return HeadEnsemble(heads).eval()


@pytest.fixture
def embeddings() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bundle(ensemble: HeadEnsemble, backbone: Backbone, tmp_path: Path) -> Path:
    save_head(str(tmp_path / "head"), ensemble, backbone, "center_crop", {"epochs": 12})
    return tmp_path / "head"


def test_score_is_in_rating_units() -> None:
    head = RegressionHead(2, hidden=2, target_mean=5.0, target_std=2.0).requires_grad_(False)
    head.hidden.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    head.hidden.bias.copy_(torch.tensor([0.0, -1.0]))
    head.output.weight.copy_(torch.tensor([[3.0, -2.0]]))
    head.output.bias.fill_(0.5)
    embeddings = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])  # hidden: (1, 1), (0, 0)
    assert head.standardised(embeddings).tolist() == [1.5, 0.5]
    assert head(embeddings).tolist() == [8.0, 6.0]


def test_dropout_only_while_training(embeddings: Tensor) -> None:
    head = RegressionHead(8, hidden=512, dropout=0.5)
    assert not torch.equal(head.train()(embeddings), head(embeddings))
    assert torch.equal(head.eval()(embeddings), head(embeddings))


def test_ensemble_predicts_the_mean_of_its_heads(ensemble: HeadEnsemble, embeddings: Tensor) -> None:
    each = torch.stack([head(embeddings) for head in ensemble.variants])
    assert torch.equal(ensemble.each(embeddings), each)
    torch.testing.assert_close(ensemble(embeddings), (each[0] + each[1] + each[2]) / 3)
    assert each.std(0).min() > 0


def test_ensemble_of_one(embeddings: Tensor) -> None:
    head = head_with(0)
    assert torch.equal(as_ensemble(head)(embeddings), head(embeddings))
    ensemble = HeadEnsemble([head])
    assert as_ensemble(ensemble) is ensemble


def test_heads_of_different_inputs_are_refused() -> None:
    with pytest.raises(HeadError, match=r"same number of inputs, these have \[8, 9\]"):
        HeadEnsemble([RegressionHead(8), RegressionHead(9)])


def test_bundle_round_trip(bundle: Path, ensemble: HeadEnsemble, backbone: Backbone, embeddings: Tensor) -> None:
    loaded = load_head(str(bundle))
    assert torch.equal(loaded.each(embeddings), ensemble.each(embeddings))
    assert [float(head.target_mean) for head in loaded.variants] == [4, 5, 6]
    assert [head.dropout.p for head in loaded.variants] == [0.25] * 3
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    check_belongs(loaded, backbone, "center_crop")


def test_record_carries_the_fingerprints(bundle: Path, backbone: Backbone) -> None:
    record, document = read_record(str(bundle))
    assert record == load_head(str(bundle)).record
    assert (record.backbone, record.weights, record.seed) == ("tiny", "random", 0)
    assert record.weights_fingerprint == backbone.weights.fingerprint
    assert record.preprocessing == "center_crop"
    assert record.embedding_fingerprint == embedding_fingerprint(backbone.spec, backbone.weights, "center_crop")
    assert record.sha256 == hashlib.sha256((bundle / "head.safetensors").read_bytes()).hexdigest()
    shown = {key: document[key] for key in ("format", "in_features", "hidden", "variants", "epochs")}
    assert shown == {"format": 1, "in_features": 8, "hidden": 5, "variants": 3, "epochs": 12}
    assert sorted(path.name for path in bundle.iterdir()) == ["head.json", "head.safetensors"]


def test_weights_open_with_plain_safetensors(bundle: Path, ensemble: HeadEnsemble) -> None:
    state = safetensors.torch.load_file(bundle / "head.safetensors")
    assert torch.equal(state["heads.1.hidden.weight"], ensemble.variants[1].hidden.weight)


def test_bundle_on_another_filesystem(ensemble: HeadEnsemble, backbone: Backbone, embeddings: Tensor) -> None:
    save_head("memory://heads-test/head", ensemble, backbone, "letterbox", {})
    loaded = load_head("memory://heads-test/head")
    assert torch.equal(loaded(embeddings), ensemble(embeddings))
    assert fsspec.filesystem("memory").exists("/heads-test/head/head.json")


def test_saving_leaves_the_heads_where_they_are(bundle: Path, ensemble: HeadEnsemble) -> None:
    assert bundle.exists()
    assert all(parameter.requires_grad for parameter in ensemble.parameters())


def _rewrite(bundle: Path, **changes: Any) -> None:
    record = json.loads((bundle / "head.json").read_text())
    record.update(changes)
    (bundle / "head.json").write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def _tamper(bundle: Path) -> None:
    data = bytearray((bundle / "head.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "head.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: (b / "head.json").unlink(), "it has no head.json"),
        (lambda b: (b / "head.safetensors").unlink(), "has head.json but no head.safetensors"),
        (lambda b: (b / "head.json").write_text("{"), "head.json in .* is not JSON"),
        (lambda b: (b / "head.json").write_text("[1]"), "has format None, this version reads 1"),
        (lambda b: _rewrite(b, format=2), "has format 2, this version reads 1"),
        (lambda b: _rewrite(b, preprocessing=None), "lacks 'preprocessing'"),
        (lambda b: _rewrite(b, hidden=None), "is not a usable head bundle: 'hidden'"),
        (lambda b: _rewrite(b, hidden=6), "is not a usable head bundle: .*size mismatch"),
        (lambda b: _rewrite(b, hidden=[6]), "is not a usable head bundle: "),
        (_tamper, "head.safetensors in .* has SHA-256 [0-9a-f]{64}, its record says [0-9a-f]{64}"),
    ],
)
def test_damaged_bundle_is_refused(damage: Callable[[Path], Any], said: str, bundle: Path) -> None:
    damage(bundle)
    with pytest.raises(HeadError, match=f"(?s){said}") as caught:
        load_head(str(bundle))
    assert str(bundle) in str(caught.value)


def test_no_bundle_names_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"jobs/train\.py writes one"):
        load_head(str(tmp_path / "nothing"))


def test_head_of_other_weights_is_refused_with_both_fingerprints(bundle: Path, backbone: Backbone) -> None:
    other = load_backbone("tiny", weights="random", seed=1)
    with pytest.raises(HeadError) as caught:
        check_belongs(load_head(str(bundle)), other, "center_crop")
    for fingerprint in (backbone.weights.fingerprint, other.weights.fingerprint):
        assert fingerprint in str(caught.value)


def test_head_of_other_preprocessing_is_refused(bundle: Path, backbone: Backbone) -> None:
    with pytest.raises(HeadError, match="preprocessing 'center_crop', not 'letterbox'"):
        check_belongs(load_head(str(bundle)), backbone, "letterbox")


def test_head_of_another_backbone_is_refused(bundle: Path, backbone: Backbone) -> None:
    _rewrite(bundle, backbone="elsewhere")
    with pytest.raises(HeadError, match="backbone 'elsewhere', not 'tiny'"):
        check_belongs(load_head(str(bundle)), backbone, "center_crop")


def test_head_of_other_input_geometry_is_refused(bundle: Path, backbone: Backbone) -> None:
    """Name, weights and mode agree; the embedding's fingerprint still tells, as after a change of the record."""
    _rewrite(bundle, embedding_fingerprint="f" * 64)
    expected = embedding_fingerprint(backbone.spec, backbone.weights, "center_crop")
    with pytest.raises(HeadError, match=f"embeddings {'f' * 16}…, this backbone .* give {expected[:16]}…"):
        check_belongs(load_head(str(bundle)), backbone, "center_crop")


def test_hand_made_head_must_only_fit_in_size(backbone: Backbone) -> None:
    check_belongs(as_ensemble(RegressionHead(8)), backbone, "center_crop")
    with pytest.raises(HeadError, match="takes embeddings of 9 numbers; tiny gives 8"):
        check_belongs(as_ensemble(RegressionHead(9)), backbone, "center_crop")


def test_a_bundle_that_cannot_be_reached_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Botocore's errors are no `OSError`."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage = Storage(endpoint_url="http://127.0.0.1:9")
    for read in (read_record, load_head):
        with pytest.raises(StorageError, match=r"'s3://somebody/head/head\.json' cannot be read: NoCredentialsError"):
            read("s3://somebody/head", storage)
    with pytest.raises(StorageError, match=r"'s3://somebody/ratings\.csv' cannot be read: NoCredentialsError"):
        read_ratings(RatingsConfig(path="s3://somebody/ratings.csv"), storage)
    with pytest.raises(StorageError, match="cannot be read: NoCredentialsError"):
        storage.open("s3://somebody/head").exists()
