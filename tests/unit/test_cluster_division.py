"""A cluster divided among the stages, from one core up to one that grows from nothing; Ray itself is not started."""

import os
import subprocess
import sys

import pytest

from ais.config import ComputeConfig
from ais.errors import ConfigError
from ais.pipeline.cluster import Cluster, Nodes, Pools, divide, reachable

CPUS = (1, 2, 3, 4, 8, 16, 64)
GPUS = (0, 1, 4, 8)
SEVERAL = {
    "two of two": (Nodes(2, 0, 2),),
    "two of one": (Nodes(1, 0, 2),),
    "eight of two": (Nodes(2, 0, 8),),
    "small and large": (Nodes(3), Nodes(64)),
    "a GPU on a small node": (Nodes(1, 1, 2), Nodes(8)),
    "GPUs and nothing else": (Nodes(2, 1, 3),),
    "four GPUs a node": (Nodes(8, 4, 2), Nodes(16, 0, 2)),
    "a head without CPUs": (Nodes(0), Nodes(16, 0, 4)),
}


def one(cpus: float, gpus: float = 0) -> Cluster:
    return Cluster((Nodes(cpus, gpus),))


def reserved_cpus(pools: Pools) -> float:
    return pools.scoring_actors * pools.scoring_cpus + pools.fetch_actors * pools.fetch_cpus


def place(pools: Pools, cluster: Cluster) -> bool:
    """Put every actor and two tasks on nodes, the large ones first, each on the first node with room."""
    left = [[node.cpus, node.gpus] for node in cluster.nodes for _ in range(node.count)]
    wanted = [(pools.scoring_cpus, pools.scoring_gpus)] * pools.scoring_actors
    wanted += [(pools.fetch_cpus, 0)] * pools.fetch_actors + [(pools.task_cpus, 0)] * 2
    for cpus, gpus in wanted:
        # As Ray does, nodes with GPUs last for what needs none.
        fitting = [node for node in left if node[0] >= cpus - 1e-9 and node[1] >= gpus]
        if not fitting:
            return False
        chosen = min(fitting, key=lambda node: node[1]) if not gpus else fitting[0]
        chosen[0] -= cpus
        chosen[1] -= gpus
    return True


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("cpus", CPUS)
def test_leaves_room_for_two_tasks_on_every_machine(cpus: int, gpus: int) -> None:
    pools = divide(ComputeConfig(), one(cpus, gpus))
    # Ray counts resources in steps of 1/10000.
    assert reserved_cpus(pools) + 2 * pools.task_cpus <= cpus + 1e-9
    assert min(pools.scoring_cpus, pools.fetch_cpus, pools.task_cpus) >= 1e-2
    assert pools.fetch_cpus <= 1
    assert pools.task_cpus <= 1
    assert pools.scoring_actors * pools.scoring_gpus == gpus
    assert pools.scoring_actors == (gpus or (cpus if cpus < 4 else cpus // 4))
    assert 1 <= pools.fetch_actors <= cpus


@pytest.mark.parametrize("nodes", SEVERAL.values(), ids=SEVERAL)
def test_everything_finds_a_place_on_several_nodes(nodes: tuple[Nodes, ...]) -> None:
    cluster = Cluster(nodes)
    pools = divide(ComputeConfig(), cluster)
    assert place(pools, cluster)
    assert pools.scoring_actors * pools.scoring_gpus == cluster.gpus
    enough_fetching = bool(cluster.gpus) and pools.fetch_actors == 8 * pools.scoring_actors
    assert enough_fetching or reserved_cpus(pools) >= cluster.cpus / 2


@pytest.mark.parametrize(
    "actors", [{"fetch_actors": 9}, {"scoring_actors": 5}, {"fetch_actors": 9, "scoring_actors": 5}]
)
@pytest.mark.parametrize("cpus", CPUS)
def test_more_actors_than_cpus_share_them(cpus: int, actors: dict[str, int]) -> None:
    for cluster in (one(cpus), Cluster((Nodes(1, 0, cpus),)), Cluster((Nodes(1, 1), Nodes(cpus)))):
        pools = divide(ComputeConfig.model_validate({**actors, "device": "cpu"}), cluster)
        assert place(pools, cluster)
        assert pools.fetch_actors == actors.get("fetch_actors", pools.fetch_actors)
        assert pools.scoring_actors == actors.get("scoring_actors", pools.scoring_actors)
        assert min(pools.scoring_cpus, pools.fetch_cpus) >= 1e-3


def test_known_divisions() -> None:
    assert divide(ComputeConfig(), one(2)) == Pools(2, 0.625, 0, 1, 1, 0.25, 0.25, 2, 16)
    # A second copy of the network is not worth its start for so few.
    assert divide(ComputeConfig(), one(2), images=384) == Pools(1, 1.25, 0, 2, 1, 0.25, 0.25, 2, 16)
    assert divide(ComputeConfig(), one(2), images=385).scoring_actors == 2
    assert divide(ComputeConfig(), one(8)) == Pools(2, 2, 0, 4, 2, 1, 1, 8, 16)
    assert divide(ComputeConfig(), one(16, 1)) == Pools(1, 1, 1, None, 8, 1, 1, 16, 64)
    assert divide(ComputeConfig(), Cluster((Nodes(16, 0, 4),))) == Pools(11, 4, 0, 4, 16, 1, 1, 64, 16)


def test_the_configuration_decides_the_device_and_the_batch() -> None:
    assert divide(ComputeConfig(device="cpu"), one(16, 4)).scoring_gpus == 0
    assert divide(ComputeConfig(batch_size=5), one(16, 1)).batch == 5
    # Two actors on each GPU; GPUs reserved and not used.
    assert divide(ComputeConfig(scoring_gpus=0.5), one(16, 2)).scoring_actors == 4
    pools = divide(ComputeConfig(scoring_gpus=1, device="cpu"), one(16, 2))
    assert (pools.scoring_gpus, pools.scoring_threads, pools.batch) == (1, 1, 16)


@pytest.mark.parametrize("compute", [ComputeConfig(device="cuda"), ComputeConfig(scoring_gpus=2)])
def test_gpus_that_there_cannot_be_are_refused(compute: ComputeConfig) -> None:
    with pytest.raises(ConfigError, match=r"compute\.(device=cuda|scoring_gpus=2): .*compute\.max_gpus"):
        divide(compute, one(16))


class TestGrowing:
    def test_pools_are_sized_for_what_the_cluster_can_become_and_start_small(self) -> None:
        cluster = reachable(ComputeConfig(), Cluster((Nodes(0),)), {"ais.max-cpus": "64", "ais.max-gpus": "4"})
        pools = divide(ComputeConfig(), cluster, images=10**6)
        assert (pools.scoring_actors, pools.least_scoring) == (4, 1)
        assert (pools.fetch_actors, pools.least_fetch) == (32, 1)
        assert pools.scoring_options()["compute"].initial_size == 4
        assert pools.fetch_options()["compute"].initial_size == 1
        assert place(pools, cluster)

    def test_no_further_than_there_is_work(self) -> None:
        cluster = reachable(ComputeConfig(max_cpus=64, max_gpus=8), Cluster((Nodes(0),)), {})
        assert divide(ComputeConfig(), cluster, images=64 * 4 * 2 + 1).scoring_actors == 3
        assert divide(ComputeConfig(), cluster, images=1).scoring_actors == 1
        # What is up is used, however little the work.
        assert divide(ComputeConfig(), one(64, 8), images=1).scoring_actors == 8

    @pytest.mark.parametrize("cpus", range(1, 40))
    def test_nothing_reserves_more_than_a_node_may_have(self, cpus: int) -> None:
        cluster = reachable(ComputeConfig(max_cpus=cpus), Cluster((Nodes(0),)), {})
        pools = divide(ComputeConfig(), cluster)
        assert max(pools.scoring_cpus, pools.fetch_cpus, pools.task_cpus) <= 1
        assert place(pools, cluster)

    def test_a_cluster_of_which_nothing_is_known_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"compute\.max_cpus: no worker .*--labels=ais\.max-cpus=64"):
            reachable(ComputeConfig(), Cluster((Nodes(0),)), {})
        with pytest.raises(ConfigError, match="'many', expected a number"):
            reachable(ComputeConfig(), Cluster((Nodes(0),)), {"ais.max-cpus": "many"})

    def test_what_is_up_counts_where_it_is_all_there_is(self) -> None:
        up = Cluster((Nodes(0), Nodes(16, 1, 2)))
        assert reachable(ComputeConfig(), up, {}) is up
        assert reachable(ComputeConfig(max_gpus=2), up, {}) is up
        assert reachable(ComputeConfig(max_gpus=3), up, {}).gpus == 3
        # Of a cluster whose nodes come and go nothing is needed that may be gone, and a dead node is not counted on.
        labels = {"ais.max-cpus": "2", "ais.max-gpus": "0"}
        for seen in (2, 3):
            found = reachable(ComputeConfig(fetch_actors="1..2"), Cluster((Nodes(0), Nodes(1, 0, seen))), labels)
            assert (found.cpus, found.grows) == (2, True)
            pools = divide(ComputeConfig(fetch_actors="1..2"), found)
            assert (pools.scoring_actors, pools.least_fetch) == (1, 1)
            assert place(pools, found)
        # The configuration beats the label.
        assert reachable(ComputeConfig(max_cpus=99), up, {"ais.max-cpus": "50"}).cpus == 99

    def test_ranges_and_fixed_numbers(self) -> None:
        pools = divide(ComputeConfig(scoring_actors="2..3", fetch_actors="4"), one(32, 4))
        assert (pools.least_scoring, pools.scoring_actors) == (2, 3)
        assert (pools.least_fetch, pools.fetch_actors) == (None, 4)
        strategy = pools.scoring_options()["compute"]
        assert (strategy.min_size, strategy.max_size) == (2, 3)


def test_what_a_killed_start_held_is_free_after_half_a_minute() -> None:
    """Ray has no public way to say so: that it still reads the variable is all that can be seen without waiting."""
    program = """
from ais.pipeline.cluster import set_up_ray_data
set_up_ray_data()
from ray.data._internal.cluster_autoscaler.default_cluster_autoscaler_v2 import DefaultClusterAutoscalerV2
print(DefaultClusterAutoscalerV2.AUTOSCALING_REQUEST_EXPIRE_TIME_S)
"""
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert made.stdout == "30\n", made.stderr


@pytest.mark.parametrize(
    ("address", "error"), [("nowhere:port", "ValueError: "), ("127.0.0.1:9", "ConnectionRefusedError: ")]
)
def test_a_cluster_that_cannot_be_joined_is_named(address: str, error: str) -> None:
    """In a process of its own, since Ray may run in this one."""
    code = """
from ais.command_line import run_job
from ais.pipeline import cluster
cluster._KNOCK_S = 1
run_job(lambda _: cluster.start_ray())
"""
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the cluster of RAY_ADDRESS={address} cannot be joined: {error}")
    assert "leave RAY_ADDRESS unset" in done.stderr
