"""One line out of a worker's trace. The texts are those of Ray 2.60, shortened; nothing runs."""

import ray.exceptions

from ais.pipeline.heatmaps import worker_failure


def test_the_exception_is_named_and_not_rays_advice() -> None:
    text = (
        "ray::MapWorker(MapBatches(Explain)).submit() (pid=1, ip=127.0.0.1)\n"
        '  File "explain.py", line 5, in load\n'
        "ais.errors.WeightsError: the weights here have fingerprint a, the driver saw b\n"
        "To change retry attempts, backoff, or which errors are retried, configure `DataContext`.\n"
    )
    found = worker_failure(ray.exceptions.RayError(text))
    assert found == "ais.errors.WeightsError: the weights here have fingerprint a, the driver saw b"


def test_without_an_exception_the_last_line_has_to_do() -> None:
    assert worker_failure(ray.exceptions.RayError("The actor died.\nIts node was lost.")) == "Its node was lost."
    assert worker_failure(ray.exceptions.RayError("")) == "RayError"
