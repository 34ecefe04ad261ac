"""What Prometheus sees of a run, through Ray's metrics: a few additions a batch, where the images are.

Ray exports each name with ``ray_`` before it, on every node's metrics port; `cluster/grafana.json` shows them. Queue
lengths are Ray Data's own (``ray_data_num_external_inqueue_blocks``).
"""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_BATCH_BOUNDARIES_S = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]


class Metrics:
    """The metrics of this process; `metrics` gives the one that there is."""

    def __init__(self) -> None:
        self.images_scored = Counter("ais_images_scored", "Images with a score.", ("run",))
        self.images_failed = Counter("ais_images_failed", "Images that could not be used.", ("run", "stage", "reason"))
        self.stage_seconds = Counter(
            "ais_stage_seconds", "Seconds spent, over all images and workers.", ("run", "stage")
        )
        self.batch_seconds = Histogram(
            "ais_batch_seconds",
            "Seconds that the network takes for a batch, until its results are on the CPU.",
            _BATCH_BOUNDARIES_S,
            ("run", "device"),
        )
        self.images_left = Gauge("ais_images_left", "Images of the run that are still to come.", ("run",))


@cache
def metrics() -> Metrics:
    """Return the metrics of this process, made at the first call."""
    return Metrics()


def spent(run: str, stage: str, seconds: float) -> None:
    """Count seconds of a stage."""
    if seconds > 0:
        metrics().stage_seconds.inc(seconds, {"run": run, "stage": stage})


class Meter:
    """Counts finished batches, for the progress line and for Prometheus; goes to the actors.

    Args:
        counter: the actor that counts for the progress line.
        run: id of the run.
    """

    def __init__(self, counter: Any, run: str) -> None:
        self._counter = counter
        self._run = run

    def batch(
        self, stages: Iterable[str], reasons: Iterable[str], device: str, batch_s: float, stage_s: Mapping[str, float]
    ) -> None:
        """Count a batch that the network has seen.

        Args:
            stages: of every row, the stage that failed, or ``""``.
            reasons: of every row.
            device: that the network is on.
            batch_s: seconds that it took.
            stage_s: seconds of other stages, summed over the rows.
        """
        outcomes = Counted(zip(stages, reasons, strict=True))
        rows = outcomes.total()
        failed = {outcome: count for outcome, count in outcomes.items() if outcome[0]}
        errors = sum(failed.values())
        self._counter.add.remote(rows, errors)
        known = metrics()
        if rows > errors:
            known.images_scored.inc(rows - errors, {"run": self._run})
            known.batch_seconds.observe(batch_s, {"run": self._run, "device": device})
            spent(self._run, "score", batch_s)
        for (stage, reason), count in failed.items():
            known.images_failed.inc(count, {"run": self._run, "stage": stage, "reason": reason})
        for stage, seconds in stage_s.items():
            spent(self._run, stage, seconds)

    def out_of_memory(self, images: int) -> None:
        """Note that no more than so many images fit into one pass."""
        self._counter.out_of_memory.remote(images)
