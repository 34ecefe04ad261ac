"""AIS as the paper defines it, computed here step by step from a network and nothing of ours, in float64.

Truong, Pesenti and Hasson, arXiv 2409.16292. A hook zeroes one map of one or all images, the whole network runs, images
are compared two at a time with Python's own arithmetic. Nothing is faked; the networks are small.
"""

from math import fsum, sqrt

import numpy as np
import pytest
import torch

from ais.ablation import replaced_coordinates, run_trunk
from ais.backbones import Backbone, TailKind
from ais.importance.general import general_similarities
from ais.importance.similarity import collective_ais, collective_ais_of, individual_ais, individual_ais_of
from tests.networks import MAPS, SIDE, small_backbone

IMAGES = 7


def correlation(x: list[float], y: list[float]) -> float:
    """Pearson's r, as in a textbook."""
    mean_x, mean_y = fsum(x) / len(x), fsum(y) / len(y)
    covariance = fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sqrt(fsum((a - mean_x) ** 2 for a in x) * fsum((b - mean_y) ** 2 for b in y))


def embed(backbone: Backbone, images: torch.Tensor, ablated: int | None = None) -> list[list[float]]:
    """Embeddings of the images one by one, with one map of the layer set to zero."""

    def zero(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        if ablated is not None:
            output[:, ablated] = 0
        return output

    handle = backbone.network.get_submodule("layer").register_forward_hook(zero)
    try:
        with torch.no_grad():
            return [backbone.network(image[None])[0].tolist() for image in images]
    finally:
        handle.remove()


def agreement(embeddings: list[list[float]], human: np.ndarray) -> float:
    """R²: the similarity of every two images, and its correlation with people's, squared."""
    pairs = [(i, j) for i in range(IMAGES) for j in range(i + 1, IMAGES)]
    model = [correlation(embeddings[i], embeddings[j]) for i, j in pairs]
    return correlation(model, [float(human[i, j]) for i, j in pairs]) ** 2


def paper_collective(backbone: Backbone, images: torch.Tensor, human: np.ndarray) -> list[float]:
    full = agreement(embed(backbone, images), human)
    return [full - agreement(embed(backbone, images, k), human) for k in range(MAPS)]


def paper_individual(backbone: Backbone, images: torch.Tensor, human: np.ndarray) -> list[list[float]]:
    intact = embed(backbone, images)
    without = [embed(backbone, images, k) for k in range(MAPS)]
    found = []
    for i in range(IMAGES):
        others = [j for j in range(IMAGES) if j != i]
        people = [float(human[i, j]) for j in others]
        full = correlation([correlation(intact[i], intact[j]) for j in others], people)
        found.append(
            [full - correlation([correlation(without[k][i], intact[j]) for j in others], people) for k in range(MAPS)]
        )
    return found


def case(name: str) -> tuple[Backbone, torch.Tensor, np.ndarray]:
    # Coarse patches: fine noise is pooled to nearly the same embedding for all images.
    coarse = 3 * torch.randn(IMAGES, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    images = torch.nn.functional.interpolate(coarse, (SIDE, SIDE))
    return small_backbone(name), images, np.corrcoef(np.random.default_rng(4).normal(size=(IMAGES, 5)))


@pytest.mark.parametrize(
    "name", ["end of a residual block", "end of a dense block", "flatten to linear", "squeeze and excitation"]
)
def test_similarity_ais_is_the_papers(name: str) -> None:
    """Measured worst errors: 5e-16 of collective AIS up to 3e-2, 4e-15 of individual AIS up to 1."""
    backbone, images, human = case(name)
    collective, individual = paper_collective(backbone, images, human), paper_individual(backbone, images, human)
    assert np.abs(collective).max() > 1e-3
    found = {
        level: compute(parts, intact, human)
        for level, compute in (("collective", collective_ais_of), ("individual", individual_ais_of))
        for intact, parts in [general_similarities(backbone, [images[:4], images[4:]], level, chunk=4)]
    }
    np.testing.assert_allclose(found["collective"], collective, rtol=0, atol=4e-14)
    np.testing.assert_allclose(found["individual"], individual, rtol=0, atol=4e-14)
    if backbone.split.kind is TailKind.CHANNELWISE:
        with torch.no_grad():
            maps, context = run_trunk(backbone.split, images)
            embeddings = backbone.split.tail(maps, *context)
            first, changes = replaced_coordinates(backbone.split, maps, context, embeddings)
        replacements = (embeddings[:, first : first + MAPS] + changes).numpy()
        arguments = (embeddings.numpy(), replacements, first, human)
        np.testing.assert_allclose(collective_ais(*arguments), collective, rtol=0, atol=4e-14)
        np.testing.assert_allclose(individual_ais(*arguments), individual, rtol=0, atol=4e-14)
