"""The networks themselves: torchvision's, cut at the embedding, under the module names that the notes use.

torchvision is imported where one of its networks is built: that takes as long as importing torch, and processes that
build another network, or none, start without it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models import DenseNet


def build(name: str, **options: Any) -> nn.Module:
    """torchvision's network of this name, untrained, with its classifier."""
    from torchvision import models

    network: nn.Module = getattr(models, name)(weights=None, **options)
    return network


class PooledFeatures(nn.Module):
    """``features`` → global average pool: ``(B, 3, H, W) -> (B, D)``."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the embedding of normalised images."""
        return torch.flatten(self.pool(self.features(images)), 1)


class VGGEmbedding(nn.Module):
    """VGG up to the ReLU after its second fully connected layer (fc2): ``(B, 3, H, W) -> (B, 4096)``.

    The layer that Truong, Pesenti and Hasson (arXiv 2409.16292) compare with human similarity.
    """

    def __init__(self, vgg: nn.Module) -> None:
        super().__init__()
        from torchvision.models import VGG

        assert isinstance(vgg, VGG)
        self.features = vgg.features
        self.avgpool = vgg.avgpool
        self.classifier = vgg.classifier[:-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return the embedding of normalised images."""
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


class DenseNetEmbedding(nn.Module):
    """DenseNet's features → ReLU → global average pool: ``(B, 3, H, W) -> (B, D)``."""

    def __init__(self, densenet: DenseNet) -> None:
        super().__init__()
        self.features = densenet.features
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the embedding of normalised images."""
        return torch.flatten(self.pool(self.relu(self.features(images))), 1)


def adapt_resnet(resnet: nn.Module) -> nn.Module:
    """ResNet's children without average pool and classifier, as the notes' ``features`` (layer4 is ``features.7``)."""
    from torchvision.models import ResNet

    assert isinstance(resnet, ResNet)
    return PooledFeatures(nn.Sequential(*list(resnet.children())[:-2]))


def adapt_efficientnet(efficientnet: nn.Module) -> nn.Module:
    """EfficientNet's own ``features``, pooled."""
    from torchvision.models import EfficientNet

    assert isinstance(efficientnet, EfficientNet)
    return PooledFeatures(efficientnet.features)


def adapt_densenet(densenet: nn.Module) -> nn.Module:
    """DenseNet's own ``features``, pooled after the ReLU that torchvision applies outside of it."""
    from torchvision.models import DenseNet

    assert isinstance(densenet, DenseNet)
    return DenseNetEmbedding(densenet)


def adapt_inception(inception: nn.Module) -> nn.Module:
    """Inception-v3 without auxiliary classifier; its classifier becomes the identity."""
    from torchvision.models import Inception3

    assert isinstance(inception, Inception3)
    inception.aux_logits = False
    inception.AuxLogits = None
    inception.dropout = nn.Identity()
    inception.fc = nn.Identity()
    return inception


# Files of torchvision before 0.3 say `norm.1`; torchvision itself still renames the keys of the published
# DenseNets at load (torchvision.models.densenet._load_state_dict).
_OLD_DENSENET_KEY = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$"
)


def rename_densenet_key(key: str) -> str:
    """Return today's name of a DenseNet state dict key."""
    return _OLD_DENSENET_KEY.sub(r"\1\2", key)
