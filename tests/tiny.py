"""A small backbone of the usual build, registered as ``tiny``: for tests of everything around backbones.

Importable where the repository root is on the path, by Ray workers too.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ais.backbones import BackboneSpec, TailKind, load_backbone, register
from ais.backbones.families import PooledFeatures
from ais.heads import HeadEnsemble, RegressionHead, save_head


class TinyClassifier(nn.Module):
    """Three convolutions of stride 2, 1 and 2, and a classifier of ten classes: 4 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def adapt_tiny(classifier: nn.Module) -> nn.Module:
    """Keep the features, pooled."""
    assert isinstance(classifier, TinyClassifier)
    return PooledFeatures(classifier.features)


TINY = register(
    BackboneSpec(
        name="tiny",
        build=TinyClassifier,
        adapt=adapt_tiny,
        published=None,
        input_size=32,
        resize_size=36,
        interpolation="bilinear",
        layer="features.6",
        map_shape=(8, 8, 8),
        embedding_size=8,
        tail=TailKind.CHANNELWISE,
        classifier=("classifier.",),
    )
)


def save_tiny_head(folder: Path) -> None:
    """Save two untrained heads on ``tiny`` with random weights of seed 3; scores spread by about 1."""
    torch.manual_seed(0)
    heads = [RegressionHead(TINY.embedding_size, hidden=32, target_mean=5, target_std=200) for _ in range(2)]
    backbone = load_backbone(TINY, weights="random", seed=3)
    save_head(str(folder), HeadEnsemble(heads), backbone, "center_crop", {})
