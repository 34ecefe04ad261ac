"""How much of a heatmap is owed to the fitted head? Against heads that were never fitted, and between variants.

Adebayo et al., *Sanity Checks for Saliency Maps*, NeurIPS 2018: a heatmap that stays the same when the weights are
drawn anew explains the architecture and the image, not what was learnt. Here the backbone stays, and the head is drawn
anew.

B images, C maps of h × w cells, K heads.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ais.heads import HeadEnsemble, RegressionHead
from ais.heatmaps import Weighting, heatmap_weights, weighted_maps
from ais.importance.similarity import pearson

RANDOM_HEADS = 8


@torch.no_grad()
def random_heads(head: HeadEnsemble, centre: Tensor, seed: int = 0) -> list[RegressionHead]:
    """Draw `RANDOM_HEADS` heads of the same size that were never fitted.

    Weights are normal, with the spread over hidden units that the fitted ones have for each coordinate, and biases
    centre the hidden units. Heads are fitted to standardised embeddings: drawn without that, they would look at
    whichever coordinates happen to be large, and differ from the fitted head for a dull reason.

    Args:
        head: the fitted head; the first variant is the model.
        centre: ``(D,)`` mean embedding.
        seed: of the weights.
    """
    first = head.variants[0]
    generator = torch.Generator().manual_seed(seed)
    spreads = [first.hidden.weight.std(0).cpu(), first.output.weight.std().cpu()]
    heads = []
    for _ in range(RANDOM_HEADS):
        stranger = RegressionHead(first.in_features, first.hidden.out_features)
        for layer, spread in zip((stranger.hidden, stranger.output), spreads, strict=True):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * spread)
        stranger.hidden.bias.copy_(-(stranger.hidden.weight.double() @ centre.double().cpu()))
        stranger.output.bias.zero_()
        heads.append(stranger.to(first.hidden.weight.device).eval())
    return heads


def heatmaps_of_each(effects_each: Tensor, feature_maps: Tensor, weighting: Weighting) -> Tensor:
    """Heatmaps ``(K, B, h, w)`` of every head.

    Args:
        effects_each: ``(K, B, C)``, of `ais.ablation.Ablation`.
        feature_maps: ``(B, C, h, w)``.
        weighting: of the maps.
    """
    return torch.stack([weighted_maps(heatmap_weights(effects, weighting), feature_maps) for effects in effects_each])


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlation ``(B,)`` over the cells of heatmaps ``(B, h, w)``; NaN where one is constant."""
    first, second = (maps.reshape(len(maps), -1) for maps in (first, second))
    constant = (np.ptp(first, axis=1) == 0) | (np.ptp(second, axis=1) == 0)
    return np.where(constant, np.nan, pearson(rankdata(first, axis=1), rankdata(second, axis=1)))


def correlation_with_each(heatmaps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Rank correlation ``(K, B)`` of heatmaps ``(B, h, w)`` with those of each of other heads ``(K, B, h, w)``."""
    return np.stack([rank_correlation(heatmaps, other) for other in others])


def correlation_between(variants: np.ndarray) -> np.ndarray:
    """Mean rank correlation ``(B,)`` between every two of ``(K, B, h, w)``; NaN for a single head."""
    pairs = [rank_correlation(variants[i], variants[j]) for i, j in combinations(range(len(variants)), 2)]
    return np.mean(pairs, axis=0) if pairs else np.full(variants.shape[1], np.nan)
