"""Exact ablation equals one map at a time with a hook, on every kind of tail and on every explainable backbone.

Nothing is faked. "Error" is the largest difference between an effect ``s - s_k`` of the fast path and of the slow one
(a difference of two float32 scores, whose rounding is most of the error), over the largest effect. The errors stated
are those measured with torch 2.14 on a CPU. The real backbones have random weights, batch norms with statistics that
are neither 0 nor 1, and a head that is scaled to their embedding, since untrained ResNets have embeddings of 1e5.
"""

import copy
import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ais import ablation
from ais.ablation import (
    Ablation,
    _moved_output,
    _share,
    ablate,
    ablate_reference,
    ablated_embeddings,
    channelwise_effects,
    replaced_coordinates,
    run_trunk,
)
from ais.backbones import Backbone, TailKind, load_backbone
from ais.errors import BackboneError
from ais.heads import HeadEnsemble, RegressionHead, as_ensemble
from ais.importance.adding import embeddings_along_reference
from ais.importance.general import general_similarities
from ais.importance.similarity import collective_ais, collective_ais_of
from tests.networks import CASES, MAPS, SIDE, randomise_batch_norms, small_backbone


def random_images(count: int, side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(11), dtype=dtype)


def seeded_head(size: int, hidden: int = 32, seed: int = 0) -> RegressionHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RegressionHead(size, hidden, target_mean=5.0, target_std=2.0).requires_grad_(False).eval()


def error(result: Ablation, reference: Tensor, maps: list[int] | None = None) -> float:
    """Largest difference to the ablated scores ``(B, len(maps))``, over the largest effect."""
    largest = result.effects.abs().max()
    assert largest > 0
    effects = result.effects if maps is None else result.effects[:, maps]
    return float((effects - (result.scores[:, None] - reference)).abs().max() / largest)


# Small networks, float64: every kind of tail, all maps

small = functools.cache(small_backbone)


@pytest.mark.parametrize("chunk", [1, 3, MAPS, None])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_map_at_a_time_on_every_kind_of_tail(name: str, chunk: int | None) -> None:
    """Measured error at most 1.3e-13."""
    backbone = small(name)
    head = as_ensemble(seeded_head(backbone.network(random_images(1, SIDE, torch.float64)).shape[1]).double())
    images = random_images(3, SIDE, torch.float64)
    result = ablate(backbone, head, images, chunk=chunk)
    assert result.effects.dtype is torch.float64
    assert result.effects.shape == (3, MAPS)
    assert error(result, ablate_reference(backbone, head, images)) < 1e-12
    torch.testing.assert_close(result.scores, head(backbone(images)))
    torch.testing.assert_close(result.embeddings, backbone(images))
    torch.testing.assert_close(result.feature_maps, backbone.network.layer(torch.relu(backbone.network.stem(images))))


@pytest.mark.parametrize("chunk", [1, 3, MAPS])
@pytest.mark.parametrize("name", CASES)
def test_maps_that_are_zero_for_some_images(name: str, chunk: int) -> None:
    """After a ReLU they change nothing, and the work on them is shared. Measured error 8e-15."""
    backbone = small_backbone(name)
    images = random_images(3, SIDE, torch.float64)
    images[1] *= 30
    bias = backbone.network.layer.bias
    with torch.no_grad():
        bias[: MAPS - 1] = torch.where(bias[: MAPS - 1] > 0, -1, -1000)
    head = as_ensemble(seeded_head(backbone.network(images[:1]).shape[1]).double())
    result = ablate(backbone, head, images, chunk=chunk)
    assert error(result, ablate_reference(backbone, head, images)) < 1e-12
    if name == "flatten to linear":
        dead = (result.feature_maps <= 0).all((2, 3))
        assert 3 <= dead.sum() < dead.numel()
        assert result.effects[dead].abs().max() < 1e-15 < 1e-3 * result.effects[~dead].abs().min()


@pytest.mark.parametrize("chunk", [1, 3, MAPS])
@pytest.mark.parametrize("name", CASES)
def test_ablated_embeddings_equal_a_zeroed_map(name: str, chunk: int) -> None:
    """The embeddings themselves, for every kind of tail, in chunks of the size asked for."""
    backbone = small(name)
    with torch.inference_mode():
        maps, context = run_trunk(backbone.split, random_images(2, SIDE, torch.float64))
        parts = list(ablated_embeddings(backbone.split, maps, context, chunk))
        assert [part.shape[1] for part in parts] == [chunk] * (MAPS // chunk)
        found = torch.cat(parts, dim=1)
        for k in range(MAPS):
            zeroed = maps.clone()
            zeroed[:, k] = 0
            torch.testing.assert_close(found[:, k], backbone.split.tail(zeroed, *context), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["flatten to linear", "two paths"])
def test_a_waiting_stream_holds_no_chunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the linear tail its shares, of the general one what its tail is run on."""
    split, chunks = small(name).split, []

    def share(*arguments: Any) -> Tensor:
        found = _share(*arguments)
        chunks.append(StorageWeakRef(found.untyped_storage()))
        return found

    class Tail(nn.Module):
        def forward(self, maps: Tensor, *context: Tensor) -> Tensor:
            chunks.append(StorageWeakRef(maps.untyped_storage()))
            found: Tensor = split.tail(maps, *context)
            return found

    monkeypatch.setattr(ablation, "_share", share)
    with torch.inference_mode():
        maps, context = run_trunk(split, random_images(2, SIDE, torch.float64))
        for _ in ablated_embeddings(dataclasses.replace(split, tail=Tail()), maps, context, 3):
            assert chunks
            assert all(chunk.expired() for chunk in chunks)


@pytest.mark.parametrize("chunk", [0, -1])
def test_impossible_chunk_is_refused(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk}: must be at least 1"):
        ablate(
            small("in-place relu"),
            as_ensemble(seeded_head(MAPS).double()),
            random_images(1, SIDE, torch.float64),
            chunk=chunk,
        )


def test_known_answer() -> None:
    """A head that adds up the embedding: without map k the score loses what map k alone gives it."""
    backbone = small("in-place relu")
    head = RegressionHead(MAPS, 1, target_mean=4.0, target_std=3.0).double().requires_grad_(False)
    head.hidden.weight.fill_(1)
    head.hidden.bias.fill_(0)
    head.output.weight.fill_(2)
    head.output.bias.fill_(-1)
    images = random_images(2, SIDE, torch.float64)
    result = ablate(backbone, as_ensemble(head), images)
    pooled = result.feature_maps.relu().mean((2, 3))
    torch.testing.assert_close(result.effects, 3 * 2 * pooled)
    torch.testing.assert_close(result.scores, 4 + 3 * (2 * pooled.sum(1) - 1))


def test_ensemble_gives_the_mean_of_its_heads() -> None:
    for name in ("end of a dense block", "flatten to linear", "two paths"):
        backbone = small(name)
        images = random_images(2, SIDE, torch.float64)
        size = backbone(images).shape[1]
        heads = [seeded_head(size, hidden=8 + seed, seed=seed).double() for seed in range(3)]
        together = ablate(backbone, HeadEnsemble(heads), images, chunk=2)
        alone = [ablate(backbone, as_ensemble(head), images) for head in heads]
        torch.testing.assert_close(together.scores, torch.stack([one.scores for one in alone]).mean(0))
        torch.testing.assert_close(together.scores_each, torch.stack([one.scores for one in alone]))
        torch.testing.assert_close(together.effects, torch.stack([one.effects for one in alone]).mean(0))
        assert error(together, ablate_reference(backbone, HeadEnsemble(heads), images)) < 1e-12


def effects_reference(head: RegressionHead, embeddings: Tensor, first: int, changes: Tensor) -> Tensor:
    """The slow, obvious twin of `channelwise_effects`: change one coordinate, run the head, subtract; in float64."""
    head, found = copy.deepcopy(head).double(), torch.empty_like(changes, dtype=torch.float64)
    for k in range(changes.shape[1]):
        changed = embeddings.double().clone()
        changed[:, first + k] += changes[:, k]
        found[:, k] = head(embeddings.double()) - head(changed)
    return found


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("chunk", [1, 3, 20, None])
def test_effects_keep_their_digits(size: float, chunk: int | None) -> None:
    """In float32, of changes that carry no hidden unit through zero, few of them, and nearly all.

    Measured error 3e-7 of the largest effect. Activations subtracted from one another in float32 give 0.13 at 1e-6.
    """
    head = seeded_head(30, hidden=64)
    embeddings, changes = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(5))
    changes = size * changes[:, :20]
    expected = effects_reference(head, embeddings, 7, changes)
    with torch.inference_mode():
        found = channelwise_effects(head, embeddings, 7, changes, chunk)
        output, weight = head.output.weight[0], head.hidden.weight[:, 7:27]
        as_on_a_gpu = -head.target_std * _moved_output(output, weight, head.hidden(embeddings), changes, chunk)
    assert (found - expected).abs().max() < 3e-6 * expected.abs().max()
    assert (as_on_a_gpu - expected).abs().max() < 3e-6 * expected.abs().max()


def test_no_effect_is_invented_where_an_embedding_is_not_a_number() -> None:
    head = seeded_head(30, hidden=64)
    embeddings, changes = torch.randn(3, 30), 1e-6 * torch.randn(3, 30)
    intact = channelwise_effects(head, embeddings, 0, changes)
    embeddings[0, 4], changes[1, 7] = torch.nan, torch.nan
    found = channelwise_effects(head, embeddings, 0, changes)
    assert found[0].isnan().all()
    assert found[1].isnan().nonzero()[:, 0].tolist() == [7]
    assert not found[2].isnan().any()
    torch.testing.assert_close(found[2], intact[2])


def test_network_is_left_as_it_was() -> None:
    backbone = small("flatten to linear")
    head = as_ensemble(seeded_head(7).double())
    images = random_images(2, SIDE, torch.float64)
    before, kept = backbone(images), images.clone()
    ablate(backbone, head, images)
    ablate_reference(backbone, head, images, [0])
    assert torch.equal(backbone(images), before)
    assert torch.equal(images, kept)
    assert not any(module._forward_hooks for module in backbone.modules())


# Real backbones, float32, at their full input size


@dataclasses.dataclass
class Real:
    """A real backbone at one of its layers, with four images and the maps that are checked one at a time."""

    backbone: Backbone
    head: HeadEnsemble
    images: Tensor
    checked: int


# name, layer, number of maps checked one at a time
REAL = [
    ("vgg16", "features.28", 8),
    ("vgg19", "features.34", 8),
    ("resnet152", "features.7.2.conv3", 8),
    ("densenet161", "features.denseblock4.denselayer24.conv2", 48),
    ("densenet161", "features.denseblock4.denselayer23.conv2", 8),
    ("barlow_twins", "features.7.2.conv3", 10),
    ("efficientnet_b3", "features.8.0", 10),
]


def prepared(name: str, layer: str | None) -> tuple[Backbone, HeadEnsemble]:
    backbone = load_backbone(name, weights="random", seed=0, layer=layer)
    randomise_batch_norms(backbone.network)
    head = seeded_head(backbone.embedding_size, hidden=512)
    with torch.inference_mode():
        spread = backbone(random_images(1, backbone.spec.input_size)).std()
    head.hidden.weight.div_(spread)
    return backbone, as_ensemble(head)


@pytest.fixture(scope="module", params=REAL, ids=lambda case: f"{case[0]}-{case[1]}")
def real(request: pytest.FixtureRequest) -> Real:
    name, layer, checked = request.param
    backbone, head = prepared(name, layer)
    return Real(backbone, head, random_images(4, backbone.spec.input_size), checked)


def maps_to_check(effects: Tensor, count: int) -> list[int]:
    """Half of them those of the largest effects, half of them by chance."""
    largest = effects.abs().amax(0).topk(count // 2).indices.tolist()
    others = torch.randperm(effects.shape[1], generator=torch.Generator().manual_seed(2)).tolist()
    return (largest + [k for k in others if k not in largest])[:count]


def test_equals_one_map_at_a_time_on_real_backbones(real: Real) -> None:
    """Chunks 1, 3 and C against the maps of the largest effects and others, of DenseNet at its layer against all 48.

    Measured error: channelwise 9e-6, linear 6e-6, general (DenseNet at denselayer23) 3e-5.
    """
    assert real.backbone.layer is not None
    images, count = real.images[:1], real.backbone.layer.map_shape[0]
    results = [ablate(real.backbone, real.head, images, chunk=chunk) for chunk in (1, 3, count)]
    maps = maps_to_check(results[0].effects, real.checked)
    reference = ablate_reference(real.backbone, real.head, images, maps)
    bound = 1e-4 if real.backbone.layer.tail is TailKind.GENERAL else 5e-5
    for result in results:
        assert result.effects.shape == (1, count)
        assert error(result, reference, maps) < bound


def test_effect_of_a_map_does_not_depend_on_the_batch(real: Real) -> None:
    """An image alone and as the third of four others; the difference over the largest effect, measured 6e-6."""
    alone = ablate(real.backbone, real.head, real.images[2:3])
    among = ablate(real.backbone, real.head, real.images)
    difference = (among.effects[2:3] - alone.effects).abs().max() / alone.effects.abs().max()
    assert difference < 5e-5


def test_trunk_runs_once(real: Real) -> None:
    first = next(module for module in real.backbone.network.modules() if isinstance(module, nn.Conv2d))
    calls: list[int] = []
    handle = first.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    try:
        ablate(real.backbone, real.head, real.images[:2])
    finally:
        handle.remove()
    assert calls == [2]


def test_similarity_ais_is_ablating_embedding_and_correlating(real: Real) -> None:
    """Of the map with the largest collective AIS and one beside it, with a hook and NumPy's ``corrcoef``.

    Measured error, of the largest AIS: 5e-6.
    """
    backbone, count = real.backbone, len(real.images)
    if backbone.spec.name == "efficientnet_b3":
        # With batch norms that shift, this deep an untrained network gives all images one embedding, to 15 digits.
        backbone = load_backbone("efficientnet_b3", weights="random", seed=0)
    coarse = 2 * torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    images = torch.nn.functional.interpolate(coarse, tuple(real.images.shape[-2:]), mode="bilinear")
    human = np.corrcoef(np.random.default_rng(0).normal(size=(count, 4)))
    if backbone.split.kind is TailKind.CHANNELWISE:
        with torch.inference_mode():
            maps, context = run_trunk(backbone.split, images)
            embeddings = backbone.split.tail(maps, *context)
            first, changes = replaced_coordinates(backbone.split, maps, context, embeddings)
        replacements = embeddings[:, first : first + changes.shape[1]] + changes
        found = collective_ais(embeddings.numpy(), replacements.numpy(), first, human)
    else:
        intact, parts = general_similarities(backbone, [images[:3], images[3:]], "collective")
        found = collective_ais_of(parts, intact, human)

    def agreement(kept: np.ndarray) -> float:
        order = np.append(kept, np.setdiff1d(np.arange(len(found)), kept))
        embedded = embeddings_along_reference(backbone, images, order, np.array([len(kept)]))[0]
        similarity, (rows, columns) = np.corrcoef(embedded.double().numpy()), np.triu_indices(count, 1)
        return float(np.corrcoef(similarity[rows, columns], human[rows, columns])[0, 1] ** 2)

    everything, largest = np.arange(len(found)), int(np.abs(found).argmax())
    full = agreement(everything)
    for k in (largest, largest - 1):
        expected = full - agreement(np.delete(everything, k))
        assert found[k] == pytest.approx(expected, abs=5e-5 * np.abs(found).max())


@pytest.fixture(scope="module")
def vgg19() -> tuple[Backbone, HeadEnsemble]:
    return prepared("vgg19", "features.28")


def test_vgg19_at_features_28_equals_one_map_at_a_time(vgg19: tuple[Backbone, HeadEnsemble]) -> None:
    """Three convolutions per map: all 512 maps in one chunk at the full input. Measured error 8e-6."""
    backbone, head = vgg19
    images = random_images(1, 224)
    result = ablate(backbone, head, images, chunk=512)
    maps = maps_to_check(result.effects, 10)
    assert error(result, ablate_reference(backbone, head, images, maps), maps) < 5e-5


def test_vgg19_at_features_28_in_small_chunks(vgg19: tuple[Backbone, HeadEnsemble]) -> None:
    """Chunks of 1 and 3 read 0.5 GB of weights each, so only the first six maps, of two images, are taken.

    Scores against `ablate_reference`, over the largest effect, also with the second image alone: measured 7e-6.
    """
    backbone, head = vgg19
    images = random_images(2, 224)
    reference = ablate_reference(backbone, head, images, range(6))
    with torch.inference_mode():
        largest = (head(backbone(images))[:, None] - reference).abs().max()
        for chunk in (1, 3):
            for some in (images, images[1:]):
                maps, context = run_trunk(backbone.split, some)
                parts = list(itertools.islice(ablated_embeddings(backbone.split, maps, context, chunk), 6 // chunk))
                scores = head(torch.cat(parts, dim=1))
                assert (scores - reference[-len(some) :]).abs().max() < 5e-5 * largest


def test_bfloat16_trunk() -> None:
    """Only the trunk is in bfloat16: effects move with the feature maps, by 1e-2 of the largest effect (measured).

    What follows the trunk is as exact as ever: the effects are those of the float32 tail on the bfloat16 maps.
    """
    backbone, head = prepared("barlow_twins", None)
    images = random_images(1, 224)
    exact = ablate(backbone, head, images)
    reduced = ablate(backbone, head, images, trunk_dtype=torch.bfloat16)
    assert {value.dtype for value in (reduced.effects, reduced.feature_maps, reduced.embeddings)} == {torch.float32}
    assert torch.equal(reduced.feature_maps, reduced.feature_maps.to(torch.bfloat16).float())
    difference = (reduced.effects - exact.effects).abs().max() / exact.effects.abs().max()
    assert 0 < difference < 0.1
    with torch.inference_mode():
        maps, context = run_trunk(backbone.split, images, torch.bfloat16)
        for k in maps_to_check(reduced.effects, 6):
            zeroed = maps.clone()
            zeroed[:, k] = 0
            lost = reduced.scores - head(backbone.split.tail(zeroed, *context))
            assert (reduced.effects[:, k] - lost).abs().max() < 5e-5 * reduced.effects.abs().max()


def test_backbone_without_heatmaps_is_refused() -> None:
    backbone = load_backbone("inception_v3", weights="random", seed=0)
    with pytest.raises(BackboneError, match="inception_v3 gives no heatmaps"):
        ablate(backbone, as_ensemble(seeded_head(2048)), random_images(1, 299))
