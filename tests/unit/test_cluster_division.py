"""A cluster's CPUs divided among the stages, from one core up; Ray itself is not started."""

import pytest

from ais.config import ComputeConfig
from ais.pipeline.cluster import Pools, divide

CPUS = (1, 2, 3, 4, 8, 16, 64)
GPUS = (0, 1, 4, 8)


def reserved_cpus(pools: Pools) -> float:
    return pools.scoring_actors * pools.scoring_cpus + pools.fetch_actors * pools.fetch_cpus


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("cpus", CPUS)
def test_leaves_room_for_two_tasks_on_every_cluster(cpus: int, gpus: int) -> None:
    pools = divide(ComputeConfig(), cpus, gpus)
    # Ray counts resources in steps of 1/10000.
    assert reserved_cpus(pools) + 2 * pools.task_cpus <= cpus + 1e-9
    assert min(pools.scoring_cpus, pools.fetch_cpus, pools.task_cpus) >= 1e-2
    assert pools.fetch_cpus <= 1
    assert pools.task_cpus <= 1
    assert pools.scoring_actors * pools.scoring_gpus == gpus
    assert pools.scoring_actors == (gpus or max(1, cpus // 4))
    assert 1 <= pools.fetch_actors <= cpus


@pytest.mark.parametrize(
    "actors", [{"fetch_actors": 9}, {"scoring_actors": 5}, {"fetch_actors": 9, "scoring_actors": 5}]
)
@pytest.mark.parametrize("cpus", CPUS)
def test_more_actors_than_cpus_share_them(cpus: int, actors: dict[str, int]) -> None:
    pools = divide(ComputeConfig.model_validate(actors), cpus, 0)
    assert reserved_cpus(pools) + 2 * pools.task_cpus <= cpus + 1e-9
    assert pools.fetch_actors == actors.get("fetch_actors", pools.fetch_actors)
    assert pools.scoring_actors == actors.get("scoring_actors", pools.scoring_actors)
    assert min(pools.scoring_cpus, pools.fetch_cpus) >= 1e-3


def test_known_divisions() -> None:
    assert divide(ComputeConfig(), 2, 0) == Pools(1, 1.25, 0, 2, 1, 0.25, 0.25, 16)
    assert divide(ComputeConfig(), 8, 0) == Pools(2, 2, 0, 4, 2, 1, 1, 16)
    assert divide(ComputeConfig(), 16, 1) == Pools(1, 1, 1, None, 8, 1, 1, 64)


def test_the_configuration_decides_the_device_and_the_batch() -> None:
    assert divide(ComputeConfig(device="cpu"), 16, 4).scoring_gpus == 0
    assert divide(ComputeConfig(device="cuda"), 16, 0).scoring_gpus == 1
    assert divide(ComputeConfig(batch_size=5), 16, 1).batch == 5
