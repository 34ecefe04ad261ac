"""The registry proves itself: every claim of every record is recomputed by a forward pass, or from torchvision.

Weights are random, since no claim of a record depends on them; test_weights.py shows how files are loaded.
"""

import copy
import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.hub import HASH_REGEX
from torchvision import models
from torchvision.transforms import InterpolationMode

from ais.backbones import (
    Backbone,
    TailKind,
    backbone_names,
    embedding_fingerprint,
    get_spec,
    inspect_layer,
    load_backbone,
    preprocessing_fingerprint,
    register,
    resolve_weights,
)
from ais.backbones.graph import map_shapes
from ais.errors import BackboneError
from ais.explainer import ScoreModel
from ais.heads import RegressionHead, as_ensemble
from tests.networks import randomise_batch_norms
from tests.tiny import TINY

NAMES = ["vgg16", "vgg19", "resnet152", "densenet161", "barlow_twins", "efficientnet_b3", "inception_v3"]
EXPLAINABLE = [name for name in NAMES if name != "inception_v3"]
TORCHVISION = {name: models.get_model_weights(name).IMAGENET1K_V1 for name in NAMES if name != "barlow_twins"}


@pytest.fixture(params=NAMES, scope="module")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return load_backbone(request.param, weights="random", seed=0)


def images_for(backbone: Backbone, count: int = 1) -> Tensor:
    side = backbone.spec.input_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def test_registry_holds_the_seven_backbones_of_the_notes() -> None:
    # Tests register small ones of their own, without published weights.
    assert {name for name in backbone_names() if get_spec(name).published is not None} == set(NAMES)
    assert backbone_names() == sorted(backbone_names())


@pytest.mark.parametrize(
    ("name", "layer", "map_shape"),
    [
        ("vgg19", "features.28", (512, 14, 14)),
        ("resnet152", "features.7.2.conv3", (2048, 7, 7)),
        ("densenet161", "features.denseblock4.denselayer24.conv2", (48, 7, 7)),
        ("barlow_twins", "features.7.2.conv3", (2048, 7, 7)),
        ("efficientnet_b3", "features.8.0", (1536, 8, 8)),
        ("vgg16", "features.28", (512, 14, 14)),
        ("inception_v3", None, None),
    ],
)
def test_default_layers_are_those_of_the_notes(name: str, layer: str, map_shape: tuple[int, int, int]) -> None:
    assert (get_spec(name).layer, get_spec(name).map_shape) == (layer, map_shape)


def test_record_is_what_a_forward_pass_finds(backbone: Backbone) -> None:
    spec = backbone.spec
    images = images_for(backbone)
    shapes = map_shapes(backbone.network, images)
    with torch.no_grad():
        assert backbone(images).shape == (1, spec.embedding_size)
    assert backbone.embedding_size == spec.embedding_size
    for layer, map_shape in ((spec.layer, spec.map_shape), *spec.other_layers):
        if layer is not None:
            assert shapes[layer] == (1, *map_shape)
            found = inspect_layer(spec, layer)
            assert found is not None
            assert (found.name, found.map_shape) == (layer, map_shape)
    for wrong, _ in spec.corrections:
        assert wrong not in dict(backbone.network.named_modules())


def test_cut_is_what_the_record_says(backbone: Backbone) -> None:
    spec = backbone.spec
    if spec.refuses_heatmaps is None:
        assert backbone.layer is not None
        assert (backbone.layer.name, backbone.layer.map_shape, backbone.layer.tail) == (
            spec.layer,
            spec.map_shape,
            spec.tail,
        )
        assert backbone.split.kind is spec.tail
    else:
        assert (spec.layer, spec.map_shape, spec.tail, backbone.layer) == (None, None, None, None)
        with pytest.raises(BackboneError, match=f"{spec.name} gives no heatmaps: {spec.refuses_heatmaps}"):
            _ = backbone.split


def test_embedding_is_what_torchvision_feeds_its_last_linear_layer(backbone: Backbone) -> None:
    """Same random weights, torchvision's own network and forward pass; measured difference 0 (bound 1e-5)."""
    name = backbone.spec.name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "inception_v3":
            original = models.inception_v3(weights=None, transform_input=True, init_weights=False)
            original.AuxLogits = None  # takes no part in eval mode
        else:
            original = models.get_model("resnet50" if name == "barlow_twins" else name, weights=None)
    original.eval()
    randomise_batch_norms(original)
    randomise_batch_norms(backbone.network)
    last = [module for module in original.modules() if isinstance(module, nn.Linear)][-1]
    fed: list[Tensor] = []
    last.register_forward_pre_hook(lambda _module, inputs: fed.append(inputs[0]))
    images = images_for(backbone, 2)
    with torch.no_grad():
        original(images)
        embedding = backbone(images)
    scale = float(fed[0].abs().max())
    torch.testing.assert_close(embedding, fed[0], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", [name for name in TORCHVISION if name != "efficientnet_b3"])
def test_preprocessing_equals_torchvisions_preset(name: str) -> None:
    spec, preset = get_spec(name), TORCHVISION[name].transforms()
    assert [spec.resize_size] == preset.resize_size
    assert [spec.input_size] == preset.crop_size
    assert InterpolationMode(spec.interpolation) is preset.interpolation
    assert (list(spec.mean), list(spec.std)) == (list(preset.mean), list(preset.std))


def test_efficientnet_b3_differs_from_the_preset_only_in_size() -> None:
    """The notes' 8×8 maps need 256 pixels; the share of the image in the crop is the preset's within a pixel."""
    spec, preset = get_spec("efficientnet_b3"), TORCHVISION["efficientnet_b3"].transforms()
    assert (spec.input_size, preset.crop_size) == (256, [300])
    assert spec.resize_size == round(256 * preset.resize_size[0] / preset.crop_size[0])
    assert InterpolationMode(spec.interpolation) is preset.interpolation
    assert (list(spec.mean), list(spec.std)) == (list(preset.mean), list(preset.std))
    at_preset = inspect_layer(dataclasses.replace(spec, input_size=300, resize_size=320))
    assert at_preset is not None
    assert at_preset.map_shape == (1536, 10, 10)


def test_barlow_twins_is_preprocessed_as_its_authors_evaluate_it() -> None:
    """evaluate.py of facebookresearch/barlowtwins: Resize(256), CenterCrop(224), ImageNet mean and deviation."""
    spec = get_spec("barlow_twins")
    assert (spec.resize_size, spec.input_size, spec.interpolation) == (256, 224, "bilinear")
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", TORCHVISION)
def test_published_address_and_digest_are_torchvisions(name: str) -> None:
    published = get_spec(name).published
    assert published is not None
    assert published.url == TORCHVISION[name].url
    digest = HASH_REGEX.search(TORCHVISION[name].url)
    assert digest is not None
    assert published.sha256 == digest[1]
    assert len(digest[1]) == 8


def test_every_record_names_licence_and_source() -> None:
    for name in NAMES:
        published = get_spec(name).published
        assert published is not None
        assert "ImageNet" in published.licence
        assert name in published.source.lower() or "Barlow Twins, ICML 2021" in published.source


def test_unknown_name_is_answered_with_did_you_mean() -> None:
    with pytest.raises(BackboneError, match=r"no backbone 'resnet125'; did you mean 'resnet152'\? choose one of"):
        get_spec("resnet125")
    with pytest.raises(BackboneError, match=r"no backbone 'zzz'; choose one of barlow_twins, densenet161"):
        load_backbone("zzz", weights="random", seed=0)


def test_register_refuses_another_record_of_the_same_name() -> None:
    register(TINY)
    with pytest.raises(BackboneError, match="'tiny' is registered already"):
        register(dataclasses.replace(TINY, input_size=64, resize_size=72))
    assert get_spec("tiny") is TINY


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_spec("vgg16").input_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "layer", "map_shape", "tail"),
    [
        ("vgg19", "features.34", (512, 14, 14), TailKind.LINEAR),
        ("vgg16", "features.21", (512, 28, 28), TailKind.LINEAR),
        ("resnet152", "features.7.2", (2048, 7, 7), TailKind.CHANNELWISE),
        ("resnet152", "features.7.2.conv2", (512, 7, 7), TailKind.LINEAR),
        ("resnet152", "features.6.3", (1024, 14, 14), TailKind.GENERAL),
        ("efficientnet_b3", "features.7.0", (384, 8, 8), TailKind.GENERAL),
        ("densenet161", "features.denseblock4.denselayer24.norm1", (2160, 7, 7), TailKind.LINEAR),
        ("densenet161", "features.denseblock4.denselayer23.conv2", (48, 7, 7), TailKind.GENERAL),
    ],
)
def test_other_layers_can_be_chosen(name: str, layer: str, map_shape: tuple[int, int, int], tail: TailKind) -> None:
    found = inspect_layer(get_spec(name), layer)
    assert found is not None
    assert (found.name, found.map_shape, found.tail) == (layer, map_shape, tail)


def test_another_layer_gives_the_same_embedding() -> None:
    first, second = (load_backbone("tiny", weights="random", seed=0, layer=layer) for layer in (None, "features.3"))
    assert second.layer is not None
    assert second.layer.map_shape == (16, 16, 16)
    images = images_for(first, 2)
    assert torch.equal(first(images), second(images))
    assert second.split.trunk(images)[0].shape == (2, 16, 16, 16)


def test_a_layer_is_checked_by_whoever_loads_the_network_too() -> None:
    with pytest.raises(BackboneError, match=r"tiny has no layer 'features.99'; nearest: features.8"):
        load_backbone("tiny", weights="random", seed=0, layer="features.99", inspected=True)


def test_wrong_layer_of_the_notes_is_refused_with_reason_and_way_out() -> None:
    ((wrong, reason),) = get_spec("densenet161").corrections
    assert wrong == "features.denseblock4.denselayer32.norm1"
    with pytest.raises(BackboneError) as caught:
        inspect_layer(get_spec("densenet161"), wrong)
    message = str(caught.value)
    assert f"densenet161 has no layer {wrong!r}: {reason}" in message
    assert "features.denseblock4.denselayer24.conv2" in reason
    assert "2160" in reason


def test_reason_of_the_correction_is_true() -> None:
    spec = get_spec("densenet161")
    with torch.device("meta"):
        shapes = map_shapes(spec.adapt(spec.build()).eval(), torch.zeros(1, 3, 224, 224))
    assert [name for name in shapes if name.startswith("features.denseblock4.denselayer24.")]
    assert not [name for name in shapes if name.startswith("features.denseblock4.denselayer25.")]
    assert shapes["features.denseblock4.denselayer24.norm1"] == (1, 2160, 7, 7)


@pytest.mark.parametrize(
    ("name", "layer", "said"),
    [
        (
            "vgg19",
            "features.82",
            ["vgg19 has no layer 'features.82'", "features.28 (512×14×14)", "default: features.28"],
        ),
        ("vgg19", "classifier.0", ["'classifier.0' of vgg19 returns", "4096), not feature maps (B, C, h, w)"]),
        ("resnet152", "layer4.2.conv3", ["no layer 'layer4.2.conv3'", "features.7.2.conv3 (2048×7×7)"]),
        ("resnet152", "features.7.2.relu", ["'features.7.2.relu' is called 3 times", "needs one call"]),
    ],
)
def test_layer_that_cannot_be_ablated_is_refused_with_the_nearest(name: str, layer: str, said: list[str]) -> None:
    with pytest.raises(BackboneError) as caught:
        load_backbone(name, weights="random", seed=0, layer=layer)
    for part in said:
        assert part in str(caught.value)


def test_layer_that_returns_no_single_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, images: Tensor) -> Tensor:
            return self.pair(images)[0].mean((2, 3))

    spec = dataclasses.replace(TINY, name="paired", build=Paired, adapt=lambda network: network, layer="pair")
    with pytest.raises(BackboneError, match="'pair' of paired does not return one tensor"):
        inspect_layer(spec)


def test_inception_refuses_every_layer_with_the_reason() -> None:
    assert inspect_layer(get_spec("inception_v3")) is None
    with pytest.raises(
        BackboneError, match=r"inception_v3 has no layer to choose: .*parallel branches.*localise poorly"
    ):
        load_backbone("inception_v3", weights="random", seed=0, layer="Mixed_7c")


def test_parameters_are_frozen_and_listed_once(backbone: Backbone) -> None:
    parameters = dict(backbone.named_parameters())
    assert parameters
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert all(name.startswith("network.") for name in parameters)


def test_batch_norm_statistics_never_move_while_a_head_trains() -> None:
    backbone = load_backbone("barlow_twins", weights="random", seed=0)
    before = copy.deepcopy(backbone.state_dict())
    model = ScoreModel(backbone, as_ensemble(RegressionHead(backbone.embedding_size, 4, dropout=0.5)))
    model.train()
    assert model.head.training
    assert not any(module.training for module in backbone.modules())
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(images_for(backbone, 2)).square().mean()
    loss.backward()
    optimiser.step()
    backbone.train()(images_for(backbone, 2))
    assert not backbone.training
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert any(name.endswith("running_mean") for name in before)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_normalise_is_torchvisions() -> None:
    """The preset's own steps after resize and crop: to float in [0, 1], then (x - mean) / std; equal to 1e-6."""
    backbone = load_backbone("tiny", weights="random", seed=0)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = pixels.clone()
    preset = models.ResNet152_Weights.IMAGENET1K_V1.transforms(crop_size=32, resize_size=32)
    torch.testing.assert_close(backbone.normalise(pixels), preset(pixels.permute(0, 3, 1, 2)), rtol=0, atol=1e-6)
    assert torch.equal(pixels, kept)


def test_fingerprints_tell_weights_backbones_and_preprocessing_apart() -> None:
    def fingerprint(
        name: str = "tiny", seed: int = 0, mode: Literal["center_crop", "letterbox"] = "center_crop"
    ) -> str:
        spec = dataclasses.replace(TINY, name=name)
        return embedding_fingerprint(spec, resolve_weights(spec, "random", seed)[0], mode)

    found = [fingerprint(), fingerprint(name="other"), fingerprint(seed=1), fingerprint(mode="letterbox")]
    assert len(set(found)) == 4
    assert fingerprint() == found[0]
    assert preprocessing_fingerprint(get_spec("efficientnet_b3"), "center_crop") == (
        "center_crop/256of273/bicubic/0.485,0.456,0.406,0.229,0.224,0.225"
    )
