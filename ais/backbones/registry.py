"""The backbones by name: frozen records, refused when registered twice, suggested when misspelt."""

from __future__ import annotations

import difflib
from functools import partial

from ais.backbones import families
from ais.backbones.spec import BackboneSpec, PublishedWeights, TailKind
from ais.errors import BackboneError

_REGISTRY: dict[str, BackboneSpec] = {}


def register(spec: BackboneSpec) -> BackboneSpec:
    """Add a backbone.

    Raises:
        BackboneError: the name is taken by another record.
    """
    if _REGISTRY.get(spec.name, spec) is not spec:
        raise BackboneError(f"a backbone named {spec.name!r} is registered already; choose another name")
    _REGISTRY[spec.name] = spec
    return spec


def backbone_names() -> list[str]:
    """Names of all registered backbones, sorted."""
    return sorted(_REGISTRY)


def get_spec(name: str) -> BackboneSpec:
    """Return the record of a backbone.

    Raises:
        BackboneError: there is none of this name; the message suggests the nearest.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, _REGISTRY, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise BackboneError(f"there is no backbone {name!r}; {hint}choose one of {', '.join(backbone_names())}")


_IMAGENET_LICENCE = "BSD-3-Clause (torchvision); trained on ImageNet-1k, whose terms are for research"


def _torchvision(file: str, weights: str) -> PublishedWeights:
    """torchvision publishes the first eight digits of the SHA-256 in the file name."""
    digest = file.rsplit("-", 1)[1].removesuffix(".pth")
    url = f"https://download.pytorch.org/models/{file}"
    return PublishedWeights(url, digest, _IMAGENET_LICENCE, f"torchvision {weights}.IMAGENET1K_V1")


register(
    BackboneSpec(
        name="vgg16",
        build=partial(families.build, "vgg16"),
        adapt=families.VGGEmbedding,
        published=_torchvision("vgg16-397923af.pth", "VGG16_Weights"),
        input_size=224,
        resize_size=256,
        interpolation="bilinear",
        layer="features.28",
        map_shape=(512, 14, 14),
        embedding_size=4096,
        tail=TailKind.LINEAR,
        classifier=("classifier.6.",),
    )
)
register(
    BackboneSpec(
        name="vgg19",
        build=partial(families.build, "vgg19"),
        adapt=families.VGGEmbedding,
        published=_torchvision("vgg19-dcbb9e9d.pth", "VGG19_Weights"),
        input_size=224,
        resize_size=256,
        interpolation="bilinear",
        layer="features.28",
        map_shape=(512, 14, 14),
        embedding_size=4096,
        tail=TailKind.LINEAR,
        classifier=("classifier.6.",),
        # features.28, as the notes name it, is conv5_1; the last convolution, conv5_4, has the same shape.
        other_layers=(("features.34", (512, 14, 14)),),
    )
)
register(
    BackboneSpec(
        name="resnet152",
        build=partial(families.build, "resnet152"),
        adapt=families.adapt_resnet,
        published=_torchvision("resnet152-394f9c45.pth", "ResNet152_Weights"),
        input_size=224,
        resize_size=256,
        interpolation="bilinear",
        layer="features.7.2.conv3",
        map_shape=(2048, 7, 7),
        embedding_size=2048,
        tail=TailKind.CHANNELWISE,
        classifier=("fc.",),
    )
)
register(
    BackboneSpec(
        name="densenet161",
        build=partial(families.build, "densenet161"),
        adapt=families.adapt_densenet,
        published=_torchvision("densenet161-8d451a50.pth", "DenseNet161_Weights"),
        input_size=224,
        resize_size=256,
        interpolation="bilinear",
        layer="features.denseblock4.denselayer24.conv2",
        map_shape=(48, 7, 7),
        embedding_size=2208,
        tail=TailKind.CHANNELWISE,
        classifier=("classifier.",),
        rename_key=families.rename_densenet_key,
        corrections=(
            (
                "features.denseblock4.denselayer32.norm1",
                "denseblock4 of DenseNet-161 ends at denselayer24, whose norm1 has 2160 maps; the 48 maps of 7×7 that "
                "the notes give are those of features.denseblock4.denselayer24.conv2",
            ),
        ),
    )
)
register(
    BackboneSpec(
        name="barlow_twins",
        build=partial(families.build, "resnet50"),
        adapt=families.adapt_resnet,
        published=PublishedWeights(
            url="https://dl.fbaipublicfiles.com/barlowtwins/ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/resnet50.pth",
            sha256=None,
            licence="MIT (facebookresearch/barlowtwins); trained on ImageNet-1k, whose terms are for research",
            source="Zbontar et al., Barlow Twins, ICML 2021; hubconf.py of facebookresearch/barlowtwins",
        ),
        input_size=224,
        resize_size=256,
        interpolation="bilinear",
        layer="features.7.2.conv3",
        map_shape=(2048, 7, 7),
        embedding_size=2048,
        tail=TailKind.CHANNELWISE,
        classifier=("fc.",),
    )
)
register(
    BackboneSpec(
        name="efficientnet_b3",
        build=partial(families.build, "efficientnet_b3"),
        adapt=families.adapt_efficientnet,
        published=_torchvision("efficientnet_b3_rwightman-b3899882.pth", "EfficientNet_B3_Weights"),
        # The notes' 8×8 maps need 256 pixels; torchvision's preset (300 of 320) gives 10×10. The share of the
        # image that the crop keeps is the preset's: 300 / 320 = 256 / 273.
        input_size=256,
        resize_size=273,
        interpolation="bicubic",
        layer="features.8.0",
        map_shape=(1536, 8, 8),
        embedding_size=1536,
        tail=TailKind.CHANNELWISE,
        classifier=("classifier.",),
    )
)
register(
    BackboneSpec(
        name="inception_v3",
        # As its published weights expect it: its own input scaling, auxiliary head present.
        build=partial(families.build, "inception_v3", transform_input=True, aux_logits=True, init_weights=False),
        adapt=families.adapt_inception,
        published=_torchvision("inception_v3_google-0cc3c7bd.pth", "Inception_V3_Weights"),
        input_size=299,
        resize_size=342,
        interpolation="bilinear",
        layer=None,
        map_shape=None,
        embedding_size=2048,
        tail=None,
        classifier=("fc.", "AuxLogits."),
        refuses_heatmaps=(
            "the last layers of Inception-v3 are parallel branches with different receptive fields, and their maps "
            "localise poorly; it predicts scores only"
        ),
    )
)
