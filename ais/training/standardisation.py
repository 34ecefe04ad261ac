"""Inputs and targets of mean 0 and standard deviation 1 while fitting; raw ones in the head that is saved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ais.heads import RegressionHead

# A channel that hardly varies over the training images would turn any deviation of another image into a huge input.
_LEAST_OF_TYPICAL = 1e-3
# float32 resolves 6e-8 of a number; below this share of the mean, what varies is mostly rounding.
_LEAST_OF_MEAN = 1e-4
_ROWS_PER_CHUNK = 4096


@dataclass(frozen=True)
class Standardisation:
    """Means and scales of training images.

    Args:
        input_mean: ``(D,)`` float64, of the embeddings.
        input_scale: ``(D,)`` float64, their standard deviations; floored, and 1 where nothing varies.
        target_mean: of the ratings.
        target_scale: standard deviation of the ratings.
    """

    input_mean: NDArray[np.float64]
    input_scale: NDArray[np.float64]
    target_mean: float
    target_scale: float

    @classmethod
    def of(
        cls, embeddings: NDArray[np.float32], scores: NDArray[np.float64], rows: NDArray[np.intp]
    ) -> Standardisation:
        """Measure the given rows of ``(P, D)`` embeddings and ``(P,)`` scores, and no others."""
        chunks = np.array_split(rows, -(-len(rows) // _ROWS_PER_CHUNK))
        mean = sum(embeddings[chunk].sum(0, dtype=np.float64) for chunk in chunks) / len(rows)
        variance = sum(np.square(embeddings[chunk] - mean).sum(0) for chunk in chunks) / len(rows)
        deviation = np.sqrt(variance)
        typical = np.sqrt(variance.mean())
        scale = np.maximum(deviation, np.maximum(_LEAST_OF_TYPICAL * typical, _LEAST_OF_MEAN * np.abs(mean)))
        target_scale = float(scores[rows].std())
        return cls(mean, np.where(scale > 0, scale, 1.0), float(scores[rows].mean()), target_scale)

    def inputs(self, embeddings: Tensor) -> Tensor:
        """Standardise embeddings ``(B, D)`` float32."""
        mean, scale = (torch.from_numpy(values).to(embeddings) for values in (self.input_mean, self.input_scale))
        return (embeddings - mean) / scale

    def targets(self, scores: NDArray[np.float64]) -> NDArray[np.float32]:
        """Standardise ratings ``(B,)``."""
        return ((scores - self.target_mean) / self.target_scale).astype(np.float32)

    def fold(self, head: RegressionHead) -> RegressionHead:
        """Turn a head on standardised inputs and targets into one on raw embeddings that returns rating units."""
        folded = RegressionHead(
            head.in_features, head.hidden.out_features, head.dropout.p, self.target_mean, self.target_scale
        )
        folded.output.load_state_dict(head.output.state_dict())
        with torch.no_grad():
            weight = head.hidden.weight.double().cpu() / torch.from_numpy(self.input_scale)
            folded.hidden.weight.copy_(weight)
            folded.hidden.bias.copy_(head.hidden.bias.double().cpu() - weight @ torch.from_numpy(self.input_mean))
        return folded.eval()
