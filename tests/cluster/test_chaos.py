"""A small ``make chaos``: see ``tests/chaos`` for what is real and what is faked."""

import sys
from pathlib import Path

import pytest

from tests.chaos.run import DRIVER, FETCHER, NODE, SCORER, Plan, run_chaos

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes under /proc")


def test_a_run_on_s3_survives_kills_and_faults(head: Path) -> None:
    kills = {DRIVER: 2, SCORER: 1, FETCHER: 1, NODE: 1}
    outcome = run_chaos(Plan(images=400, kills=kills, fault_rate=0.02, seed=1, shard_rows=10), head)
    assert outcome.survived, f"{outcome.table()}\n{outcome.wrong}\n{outcome.orphans}\n{outcome.said}"
    assert len(outcome.errors) >= 14
    assert sum(count for fault, count in outcome.faults.items() if fault != "requests") > 10
