"""What the paper's protocol costs: all 40 fits of 2048 maps and 120 images, every one with three orders of the maps.

Against the obvious way, which makes the embeddings of each number of maps anew: a few numbers of maps are timed, and
multiplied. Random numbers, as large and as many as a ResNet gives; speed does not depend on them. One thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from ais.importance.similarity import alignment
from ais.validation.protocol import Coordinates, HeadWeights, ratings_protocol, similarity_protocol
from tests.benchmarks.tables import grid, paragraph

IMAGES, MAPS, HIDDEN, FOLDS, SEEDS = 120, 2048, 512, 5, 8
EVALUATIONS = 3 * FOLDS * SEEDS  # curves
TIMED = 20


def rows() -> list[dict[str, Any]]:
    """Measure both objectives; a row each."""
    rng = np.random.default_rng(0)
    embeddings = 5 + rng.normal(size=(IMAGES, MAPS))
    coordinates = Coordinates(embeddings, embeddings * rng.uniform(0, 1, (IMAGES, MAPS)), 0)
    human = np.corrcoef(rng.normal(size=(IMAGES, 6)))
    head = HeadWeights((rng.normal(size=(HIDDEN, MAPS)), np.zeros(HIDDEN)), (rng.normal(size=HIDDEN), 0.0), (5.0, 1.0))
    scores, effects, ratings = rng.normal(size=IMAGES), rng.normal(size=(IMAGES, MAPS)), rng.normal(size=IMAGES)

    def one_similarity() -> None:
        alignment(embeddings, human)

    def one_prediction() -> None:
        np.maximum(embeddings @ head.hidden[0].T, 0) @ head.output[0]

    return [
        _row(
            "ratings", 256,
            lambda: ratings_protocol(coordinates, [head], scores, effects, ratings, FOLDS, SEEDS), one_prediction,
        ),
        _row("similarity", MAPS, lambda: similarity_protocol(coordinates, human, FOLDS, SEEDS), one_similarity),
    ]  # fmt: skip


def _row(objective: str, counts: int, protocol: Callable[[], object], once: Callable[[], object]) -> dict[str, Any]:
    with mock.patch.object(os, "cpu_count", return_value=1):  # one thread: processor time is what it would take
        taken = _processor_s(protocol)
    naive = _processor_s(lambda: [once() for _ in range(TIMED)]) / TIMED * EVALUATIONS * counts
    return {"objective": objective, "counts": counts, "processor_s": round(taken, 1), "naive_s": round(naive)}


def _processor_s(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for the README."""
    text = f"""
        The paper's protocol on {IMAGES} images and {MAPS} maps, all {FOLDS * SEEDS} fits with three orders of the maps
        each. Fits are independent and run in as many threads as there are cores.
        """
    header = ("objective", "numbers of maps", "processor time", "embeddings anew for each number of maps")
    cells = [
        (row["objective"], row["counts"], f"{row['processor_s']} s", f"{row['naive_s']} s, extrapolated")
        for row in rows
    ]
    return paragraph(text) + "\n" + grid(header, cells)
