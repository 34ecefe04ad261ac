"""The library's front door, as README and DESIGN promise it, on a small backbone and on ResNet-152.

Nothing is faked. Weights are random and seeded.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ais import Explainer, Explanation, RegressionHead, load_backbone, load_head
from ais.ablation import ablate_reference
from ais.backbones import Backbone
from ais.errors import BackboneError, HeadError
from ais.heads import HeadEnsemble, as_ensemble, save_head
from ais.images import Geometry, as_rgb_array
from tests import tiny  # noqa: F401 - registers the backbone
from tests.networks import randomise_batch_norms

SIZES = [(40, 70), (90, 33), (36, 36), (1, 1), (128, 200)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    backbone = load_backbone("tiny", weights="random", seed=0)
    randomise_batch_norms(backbone.network)
    return backbone


def head_with(seed: int, size: int = 8) -> RegressionHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RegressionHead(size, hidden=16, target_mean=5.0, target_std=2.0)


@pytest.fixture
def arrays() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def tensors(result: Explanation) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(result).items() if torch.is_tensor(value)}


def test_explanation_has_everything_that_is_promised(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    result = Explainer(backbone, head_with(0))(arrays)
    assert result.ablated_scores is not None
    shapes = {name: tuple(value.shape) for name, value in tensors(result).items()}
    assert shapes == {
        "scores": (5,),
        "score_stds": (5,),
        "importance": (5, 8),
        "ablated_scores": (5, 8),
        "feature_maps": (5, 8, 8, 8),
        "heatmaps": (5, 8, 8),
        "boxes": (5, 4),
        "heatmap_boxes": (5, 4),
    }
    assert all((value.dtype, value.device.type) == (torch.float32, "cpu") for value in tensors(result).values())
    assert result.score_stds.isnan().all()


def test_values_are_those_of_the_slow_way(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    """Scores by the whole network, effects by one map at a time, the heatmap as Σ w·relu(A) by hand."""
    explainer = Explainer(backbone, head_with(0))
    result = explainer(arrays)
    images = explainer.preprocess(arrays)
    with torch.no_grad():
        scores = explainer.head(backbone(images))
    torch.testing.assert_close(result.scores, scores)
    ablated = ablate_reference(backbone, explainer.head, images)
    torch.testing.assert_close(result.ablated_scores, ablated, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.importance, scores[:, None] - ablated, rtol=0, atol=1e-5)
    assert result.importance.abs().max() > 1e-3
    for image in range(len(arrays)):
        positive = result.importance[image].clamp(min=0)
        expected = torch.zeros(8, 8)
        for k in range(8):
            expected += positive[k] / positive.sum() * result.feature_maps[image, k].clamp(min=0)
        torch.testing.assert_close(result.heatmaps[image], expected)


def test_signed_weighting(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    result = Explainer(backbone, head_with(0), weighting="signed")(arrays)
    weights = result.importance / result.importance.abs().sum(1, keepdim=True)
    expected = (weights[:, :, None, None] * result.feature_maps.relu()).sum(1)
    torch.testing.assert_close(result.heatmaps, expected)
    assert result.importance.min() < 0
    plain = Explainer(backbone, head_with(0))(arrays).heatmaps
    assert (result.heatmaps - plain).abs().max() > 1e-3


def test_boxes_are_those_of_the_geometry(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    boxes = Explainer(backbone, head_with(0))(arrays).boxes
    for (height, width), box in zip(SIZES, boxes, strict=True):
        side = min(height, width) * 32 / 36
        left, top = (width - side) / 2, (height - side) / 2
        assert box.tolist() == pytest.approx([left, top, left + side, top + side], abs=1e-4)
    letterboxed = Explainer(backbone, head_with(0), preprocessing="letterbox")(arrays).boxes
    assert letterboxed[2].tolist() == [0, 0, 36, 36]
    assert letterboxed[0].tolist()[0] == 0
    assert letterboxed[0, 1] < 0
    assert letterboxed[0, 3] > 40


def test_preprocess_is_geometry_then_normalisation(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    found = Explainer(backbone, head_with(0)).preprocess(arrays)
    assert found.shape == (5, 3, 32, 32)
    pixels = np.stack([Geometry(32, 36, "bilinear").apply(array)[0] for array in arrays])
    expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-5)


def test_letterbox_padding_is_zero_for_the_network(backbone: Backbone) -> None:
    """The mean colour to the nearest of 256 levels: within 0.5 / 255 / std."""
    wide = np.full((16, 32, 3), 255, np.uint8)
    found = Explainer(backbone, head_with(0), preprocessing="letterbox").preprocess([wide])
    assert found[0, :, :8].abs().max() < 0.5 / 255 / 0.224
    assert found[0, :, 8:24].min() > 2


def test_images_of_every_kind_are_taken(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    explainer = Explainer(backbone, head_with(0))
    pictures = [Image.fromarray(array) for array in arrays]
    assert torch.equal(explainer(pictures).scores, explainer(arrays).scores)
    grey, palette = pictures[0].convert("L"), pictures[1].convert("P")
    alpha = pictures[2].convert("RGBA")
    alpha.putalpha(100)
    mixed = [grey, palette, alpha, arrays[4], np.asarray(grey), np.asarray(alpha)]
    plain = [as_rgb_array(image) for image in mixed]
    assert all(image.shape[2] == 3 for image in plain)
    assert torch.equal(explainer(mixed).scores, explainer(plain).scores)
    assert torch.equal(explainer(mixed).heatmaps[0], explainer(mixed).heatmaps[4])


def test_exif_orientation_of_a_pil_image_is_applied(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    upright = Image.fromarray(arrays[4])
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    explainer = Explainer(backbone, head_with(0))
    first, second = explainer([upright]), explainer([turned])
    for name in ("scores", "heatmaps", "boxes", "heatmap_boxes"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_score_and_module_agree_with_the_call(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    explainer = Explainer(backbone, head_with(0))
    scores = explainer(arrays).scores
    torch.testing.assert_close(explainer.score(arrays), scores)
    with torch.no_grad():
        torch.testing.assert_close(explainer.module(explainer.preprocess(arrays)), scores)
    assert isinstance(explainer.module, torch.nn.Module)
    assert len(set(scores.tolist())) == 5


def test_gradients_flow_through_the_module_to_the_image(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    """What Grad-CAM and other tools need of a plain module."""
    explainer = Explainer(backbone, head_with(0))
    images = explainer.preprocess(arrays[:2]).requires_grad_()
    explainer.module(images).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 3])
def test_batch_size_and_chunk_do_not_matter(
    batch_size: int, chunk: int, backbone: Backbone, arrays: list[np.ndarray]
) -> None:
    expected = tensors(Explainer(backbone, head_with(0))(arrays))
    found = tensors(Explainer(backbone, head_with(0), batch_size=batch_size, chunk=chunk)(arrays))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("setting", [True, False, "conv", "rnn"])
def test_convolutions_are_float32_and_the_settings_return(
    setting: bool | str, backbone: Backbone, arrays: list[np.ndarray]
) -> None:
    """The switches are there without a GPU as well."""
    cudnn = torch.backends.cudnn

    def switches() -> tuple[object, ...]:
        return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark, cudnn.enabled, cudnn.deterministic

    seen = []
    explainer = Explainer(backbone, head_with(0))
    first = backbone.network.get_submodule("features.0")
    handle = first.register_forward_pre_hook(lambda _m, _i: seen.append(cudnn.conv.fp32_precision))
    benchmark = cudnn.benchmark
    try:
        cudnn.benchmark = True
        if isinstance(setting, bool):
            cudnn.allow_tf32 = setting
        else:
            getattr(cudnn, setting).fp32_precision = "ieee"
        before = switches()
        explainer(arrays)
        explainer.score(arrays)
        ablate_reference(backbone, explainer.head, explainer.preprocess(arrays), [0])
        assert switches() == before
    finally:
        cudnn.allow_tf32, cudnn.benchmark = True, benchmark
        handle.remove()
    assert len(seen) >= 3
    assert "tf32" not in seen


def test_ensemble_gives_mean_and_standard_deviation(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    heads = [head_with(seed) for seed in range(3)]
    result = Explainer(backbone, HeadEnsemble(heads))(arrays)
    alone = [Explainer(backbone, head)(arrays) for head in heads]
    each = torch.stack([one.scores for one in alone])
    torch.testing.assert_close(result.scores, each.mean(0))
    torch.testing.assert_close(result.score_stds, each.std(0))
    torch.testing.assert_close(result.importance, torch.stack([one.importance for one in alone]).mean(0))


def test_given_importance_is_used_for_every_image(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    importance = [0.0, 3.0, -1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    for given in (importance, np.array(importance), torch.tensor(importance, requires_grad=True)):
        result = Explainer(backbone, head_with(0), importance=given)(arrays)
        assert result.ablated_scores is None
        assert torch.equal(result.importance, torch.tensor([importance] * 5))
        maps = result.feature_maps.relu()
        torch.testing.assert_close(result.heatmaps, 0.75 * maps[:, 1] + 0.25 * maps[:, 5])
    torch.testing.assert_close(result.scores, Explainer(backbone, head_with(0)).score(arrays))
    with pytest.raises(BackboneError, match=r"has shape \(3,\), the layer has 8 maps"):
        Explainer(backbone, head_with(0), importance=[1.0, 2.0, 3.0])
    with pytest.raises(BackboneError, match="importance of map 2 is nan, not a finite number"):
        Explainer(backbone, head_with(0), importance=[0, 1, np.nan, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weighting", "postive"),
        ("chunk", -1),
        ("chunk", 0),
        ("batch_size", -1),
        ("batch_size", 0),
        ("trunk_dtype", torch.float64),
    ],
)
def test_impossible_arguments_are_refused(name: str, value: object, backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}: must be"):
        Explainer(backbone, head_with(0), **{name: value})  # type: ignore[arg-type]


def test_trained_bundle_is_loaded_and_others_refused(
    backbone: Backbone, arrays: list[np.ndarray], tmp_path: Path
) -> None:
    head = as_ensemble(head_with(0))
    save_head(str(tmp_path), head, backbone, "center_crop", {})
    loaded = load_head(str(tmp_path))
    assert torch.equal(Explainer(backbone, loaded).score(arrays), Explainer(backbone, head).score(arrays))
    with pytest.raises(HeadError, match="preprocessing 'center_crop', not 'letterbox'"):
        Explainer(backbone, loaded, preprocessing="letterbox")
    with pytest.raises(HeadError, match="backbone weights"):
        Explainer(load_backbone("tiny", weights="random", seed=9), loaded)


def test_the_callers_head_stays_as_it_is(backbone: Backbone, arrays: list[np.ndarray]) -> None:
    head = RegressionHead(backbone.embedding_size, hidden=8, dropout=0.5).train()
    explainer = Explainer(backbone, head)
    assert head.dropout.training
    assert not explainer.head.training
    assert torch.equal(explainer.score(arrays), explainer.score(arrays)), "without dropout"


def test_no_images(backbone: Backbone) -> None:
    explainer = Explainer(backbone, head_with(0))
    assert explainer.score([]).shape == (0,)
    with pytest.raises(ValueError, match="at least one image"):
        explainer([])


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3), np.float32), np.zeros((3, 40, 40), np.uint8)])
def test_what_is_not_an_image_is_refused(bad: np.ndarray, backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="an image is uint8"):
        Explainer(backbone, head_with(0))([bad])


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        (np.zeros((40, 50, 3), np.uint8), ValueError, r"one array of shape \(40, 50, 3\): give a list of images"),
        (np.zeros((40, 50), np.uint8), ValueError, r"one array of shape \(40, 50\)"),
        (Image.new("RGB", (50, 40)), TypeError, "of type Image: give a list of PIL images"),
        ("picture.jpg", TypeError, "'picture.jpg' of type str: give a list"),
        (Path("picture.jpg"), TypeError, "of type PosixPath: give a list"),
        (None, TypeError, "None of type NoneType: give a list"),
        (["picture.jpg"], TypeError, "'picture.jpg' of type str is no image: give a PIL image"),
        ([None], TypeError, "None of type NoneType is no image"),
        ([Image.new("RGB", (0, 40))], ValueError, "size 0 × 40 has no pixels"),
    ],
)
def test_what_is_no_list_of_images_is_refused(
    images: object, kind: type[Exception], message: str, backbone: Backbone
) -> None:
    explainer = Explainer(backbone, head_with(0))
    for use in (explainer, explainer.score, explainer.preprocess):
        with pytest.raises(kind, match=message):
            use(images)  # type: ignore[operator]


def test_an_array_of_colour_or_grey_images_is_taken(backbone: Backbone) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    explainer = Explainer(backbone, head_with(0))
    for images in (colour, colour[..., 0]):
        assert torch.equal(explainer(images).scores, explainer(list(images)).scores)  # type: ignore[arg-type]


def test_inception_scores_and_refuses_heatmaps_with_the_reason(arrays: list[np.ndarray]) -> None:
    inception = load_backbone("inception_v3", weights="random", seed=0)
    explainer = Explainer(inception, head_with(0, size=2048))
    scores = explainer.score(arrays[:2])
    with torch.no_grad():
        expected = explainer.module(explainer.preprocess(arrays[:2]))
    assert expected.isfinite().all()
    torch.testing.assert_close(scores, expected)
    with pytest.raises(BackboneError, match=r"inception_v3 gives no heatmaps: .*parallel branches"):
        explainer(arrays[:2])


def test_resnet152_as_the_readme_shows_it(arrays: list[np.ndarray]) -> None:
    backbone = load_backbone("resnet152", weights="random", seed=0)
    explainer = Explainer(backbone, RegressionHead(in_features=backbone.embedding_size, hidden=512))
    result = explainer([Image.fromarray(arrays[0]), arrays[1]])
    assert result.ablated_scores is not None
    assert result.scores.shape == (2,)
    assert result.ablated_scores.shape == result.importance.shape == (2, 2048)
    assert result.feature_maps.shape == (2, 2048, 7, 7)
    torch.testing.assert_close(result.scores[:, None] - result.ablated_scores, result.importance, rtol=1e-3, atol=1.0)
    weights = result.importance.clamp(min=0)
    expected = ((weights / weights.sum(1, keepdim=True))[:, :, None, None] * result.feature_maps.relu()).sum(1)
    torch.testing.assert_close(result.heatmaps, expected)
    assert result.heatmaps.max() > 0
