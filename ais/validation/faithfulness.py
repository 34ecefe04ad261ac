"""Are heatmaps faithful to the model: does the score depend on what they point at?

Deletion and insertion curves (Petsiuk, Das and Saenko, *RISE*, BMVC 2018): the cells of the model's input are replaced
by a fill, or brought back, in the order of a heatmap. A heatmap of what raises the score is faithful if the score falls
early when its top is deleted, and rises early when its top is inserted.

B images, S × S pixels of the model's input, n × n cells of about 8 × 8 pixels, T + 1 shares of deleted cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ais.ablation import run_trunk
from ais.backbones import Backbone
from ais.heads import HeadEnsemble
from ais.heatmaps import place_on_image

CELL_PX = 8
FILLS = ("blurred", "mean")
# Wide enough that nothing of a texture is left; RISE's own 11 × 11 pixels keep coarse ones.
_BLUR_SIGMA_SHARE = 1 / 20
# Relative to the score; below it, intact image and fill score the same, and no share can be lost or won.
_NO_RANGE = 1e-6

Score = Callable[[Tensor], Tensor]


class InputMaps(NamedTuple):
    """Heatmaps on the model's input.

    Args:
        values: ``(B, h, w)``.
        extent: left, top, right, bottom edge of the cells in pixels of the input square.
    """

    values: np.ndarray
    extent: tuple[float, float, float, float]


@dataclass(frozen=True)
class Curves:
    """Scores while an image is deleted and inserted in one order, ``(B, T + 1)`` float64 in rating units.

    Args:
        deletion: from the intact image to the fill.
        insertion: from the fill to the intact image.
    """

    deletion: np.ndarray
    insertion: np.ndarray

    def areas(self) -> dict[str, np.ndarray]:
        """Area under each curve ``(B,)``, over shares from 0 to 1: the mean score along it, in rating units."""
        return {"deletion": _area(self.deletion), "insertion": _area(self.insertion)}

    def normalised_areas(self) -> dict[str, np.ndarray]:
        """The same of ``(score - score of the fill) / (intact score - score of the fill)``, ``(B,)``.

        1 where the score stays intact, 0 where it is lost at once. NaN where the fill does not score lower than the
        image: there is then nothing in it that raises the score over the fill's.
        """
        intact, blank = self.deletion[:, :1], self.deletion[:, -1:]
        span = np.where(intact - blank > _NO_RANGE * np.abs(intact), intact - blank, np.nan)
        return {
            name: _area((curve - blank) / span)
            for name, curve in (("deletion", self.deletion), ("insertion", self.insertion))
        }


def _area(curves: np.ndarray) -> np.ndarray:
    return np.asarray(np.trapezoid(curves, dx=1 / (curves.shape[1] - 1), axis=1))


@torch.inference_mode()
def perturbation_curves(
    score: Score,
    images: Tensor,
    fill: Tensor,
    ends: tuple[np.ndarray, np.ndarray],
    order: np.ndarray,
    steps: int,
) -> Curves:
    """Delete and insert the cells of images in an order.

    Args:
        score: normalised images ``(B, 3, S, S)`` → scores ``(B,)``.
        images: ``(B, 3, S, S)`` normalised.
        fill: ``(B, 3, S, S)`` what a deleted cell shows.
        ends: ``(B,)`` scores of the intact images and of the fills, which all orders share; see `scored`.
        order: ``(B, n, n)`` place of each cell in the order, from 0 (first) to n² - 1, of `cell_order`.
        steps: T, equal steps from nothing to everything.
    """
    cells = order[0].size
    place = torch.from_numpy(order).to(images.device)
    deletion, insertion = [ends[0]], [ends[1]]
    for step in range(1, steps):
        first = (place < round(step * cells / steps)).float()[:, None]
        first = F.interpolate(first, images.shape[-2:], mode="nearest-exact").bool()
        deletion.append(scored(score, torch.where(first, fill, images)))
        insertion.append(scored(score, torch.where(first, images, fill)))
    return Curves(np.stack([*deletion, ends[1]], axis=1), np.stack([*insertion, ends[0]], axis=1))


@torch.inference_mode()
def scored(score: Score, images: Tensor) -> np.ndarray:
    """Scores ``(B,)`` float64 of images ``(B, 3, S, S)``."""
    return np.asarray(score(images).double().cpu().numpy())


def score_of(backbone: Backbone, head: HeadEnsemble, dtype: torch.dtype = torch.float32) -> Score:
    """Return the model as a function: normalised images → scores in rating units; the trunk runs in ``dtype``."""

    def score(images: Tensor) -> Tensor:
        maps, context = run_trunk(backbone.split, images, dtype)
        return head(backbone.split.tail(maps, *context))

    return score


def filled(images: Tensor, fill: str) -> Tensor:
    """What is left of images ``(B, 3, S, S)`` when everything is deleted.

    Args:
        images: normalised.
        fill: ``"blurred"``, by a Gaussian of a twentieth of the side, or ``"mean"``, the image's own mean colour.
    """
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    sigma = images.shape[-1] * _BLUR_SIGMA_SHARE
    return gaussian_blur(images, 2 * round(3 * sigma) + 1, sigma)


def cell_order(maps: InputMaps, input_size: int, seed: int = 0) -> np.ndarray:
    """Place ``(B, n, n)`` int64 of each cell of the input, 0 for the highest value; ties in random order.

    Args:
        maps: on the input, read off at the centres of the cells by bilinear interpolation.
        input_size: S.
        seed: of the order of ties.
    """
    side = max(1, round(input_size / CELL_PX))
    whole = np.array([0, 0, input_size, input_size])
    orders = []
    for index, values in enumerate(maps.values):
        placed = place_on_image(values, np.array(maps.extent), (input_size, input_size), (side, side), whole).ravel()
        ties = np.random.default_rng([seed, index]).permutation(placed.size)
        place = np.empty(placed.size, np.int64)
        place[np.lexsort((ties, -placed))] = np.arange(placed.size)
        orders.append(place.reshape(side, side))
    return np.stack(orders)


def random_maps(maps: InputMaps, seed: int = 0) -> InputMaps:
    """Noise on the same grid: as smooth as the heatmaps that it is compared with, and about nothing."""
    values = np.random.default_rng(seed).random(maps.values.shape, dtype=np.float32)
    return InputMaps(values, maps.extent)


def centre_bias(count: int, input_size: int) -> InputMaps:
    """A Gaussian in the middle with a quarter of the side as σ: what people photograph is mostly there."""
    side = max(1, round(input_size / CELL_PX))
    away = (np.arange(side) + 0.5) / side - 0.5
    bump = np.exp(-(away[:, None] ** 2 + away[None, :] ** 2) / (2 * 0.25**2)).astype(np.float32)
    return InputMaps(np.repeat(bump[None], count, 0), (0.0, 0.0, float(input_size), float(input_size)))


def grad_cam(backbone: Backbone, head: HeadEnsemble, images: Tensor) -> Tensor:
    """Grad-CAM ``(B, h, w)`` of the score at the backbone's layer.

    Selvaraju et al., *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization*, ICCV 2017: the
    maps weighted by the mean over their cells of the score's gradient, summed, rectified.

    Args:
        backbone: cut at its layer.
        head: on its embedding.
        images: ``(B, 3, S, S)`` normalised.
    """
    with torch.no_grad():
        maps, context = run_trunk(backbone.split, images)
    with torch.enable_grad():
        maps = maps.detach().requires_grad_()
        scores = head(backbone.split.tail(maps, *context))
        (gradient,) = torch.autograd.grad(scores.sum(), maps)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * maps.detach()).sum(1).relu()
