"""What the submitter does with every way a job can end, and with a cluster that does not answer.

The cluster's job server is faked: a table of jobs whose ends are scripted. `tests/cluster/test_autoscaling.py` submits
to a real one.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from ais.command_line import load_config
from ais.config import HeatmapsConfig, TrainConfig
from ais.errors import ConfigError
from cluster import submit
from cluster.submit import Submitter, Unreachable

COMMAND = ["python", "jobs/score.py", "--config", "configs/score.yaml"]
DIED = object()


class JobServer:
    """Jobs end as they are told to, at the second look."""

    def __init__(self, *ends: Any) -> None:
        self.ends = list(ends)
        self.jobs: dict[str, SimpleNamespace] = {}
        self.submitted: list[str] = []
        self.faults: list[Exception] = []

    def _answer(self) -> None:
        if self.faults:
            raise self.faults.pop()

    def list_jobs(self) -> list[SimpleNamespace]:
        self._answer()
        for job in self.jobs.values():
            job.looks += 1
            if job.looks > 1 and job.status == JobStatus.RUNNING:
                job.end()
        return list(self.jobs.values())

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, str]) -> str:
        self._answer()
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        assert entrypoint == " ".join(COMMAND)
        assert runtime_env == {"working_dir": "."}
        self.submitted.append(submission_id)
        self.add(submission_id, self.ends.pop(0))
        return submission_id

    def add(self, name: str, how: Any) -> None:
        job = SimpleNamespace(
            submission_id=name,
            status=JobStatus.RUNNING,
            looks=0,
            message="as scripted",
            driver_exit_code=None,
            log="one\n",
        )

        def end() -> None:
            job.log += "two\n"
            if how == "stopped":
                job.status = JobStatus.STOPPED
            elif how == 0:
                job.status = JobStatus.SUCCEEDED
            else:
                job.status = JobStatus.FAILED
                job.driver_exit_code = None if how is DIED else how

        job.end = end
        self.jobs[name] = job

    def get_job_logs(self, name: str) -> str:
        self._answer()
        return self.jobs[name].log


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_EVERY_S", 0.001)


def run(server: JobServer, attempts: int = 3, patience_s: float = 10) -> int:
    return Submitter(server, patience_s).run(COMMAND, "score-1", attempts, ".")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "code", "submitted"),
    [
        ([0], 0, ["score-1"]),
        ([2], 2, ["score-1"]),  # the configuration is refused: it would be again
        ([4], 4, ["score-1"]),  # complete, and to be looked at
        (["stopped"], 130, ["score-1"]),
        ([1, 0], 0, ["score-1", "score-1.2"]),
        ([DIED, 1, 0], 0, ["score-1", "score-1.2", "score-1.3"]),
        ([-9, 0], 0, ["score-1", "score-1.2"]),
        ([1, DIED, 1], 1, ["score-1", "score-1.2", "score-1.3"]),
        ([DIED, DIED, DIED], 1, ["score-1", "score-1.2", "score-1.3"]),
    ],
)
def test_ends(ends: list[Any], code: int, submitted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    server = JobServer(*ends)
    assert run(server) == code
    assert server.submitted == submitted
    assert capsys.readouterr().out == "one\ntwo\n" * len(submitted)  # each line of a log once


def test_called_again_it_follows_and_adds_no_attempt() -> None:
    server = JobServer(1, 1, 1)
    assert run(server) == 1
    assert run(server) == 1
    assert len(server.submitted) == 3


def test_whoever_comes_second_follows() -> None:
    server = JobServer()
    asked: list[str] = []
    find: Callable[[], list[SimpleNamespace]] = server.list_jobs

    def somebody_is_faster() -> list[SimpleNamespace]:
        found = find()
        if not asked:
            asked.append("")
            server.add("score-1", 0)
        return found

    server.list_jobs = somebody_is_faster  # type: ignore[method-assign]
    assert run(server) == 0
    assert server.submitted == []


def test_a_cluster_that_answers_late_is_waited_for() -> None:
    server = JobServer(0)
    server.faults = [ConnectionError("refused"), RuntimeError("Request failed with status code 503"), TimeoutError()]
    assert run(server) == 0


def test_one_that_does_not_answer_is_given_up() -> None:
    server = JobServer(0)
    server.faults = [ConnectionError("refused")] * 100_000
    with pytest.raises(Unreachable, match="refused"):
        run(server, patience_s=0.05)


def test_a_new_head_knows_nothing_of_the_job_which_is_submitted_again() -> None:
    server = JobServer(0, 0)
    submit_job = server.submit_job

    def forget(**arguments: Any) -> str:
        name = submit_job(**arguments)
        if name == "score-1":
            server.jobs.clear()
        return name

    server.submit_job = forget  # type: ignore[method-assign]
    assert run(server) == 0
    assert server.submitted == ["score-1", "score-1.2"]


def test_our_own_mistakes_are_not_tried_again() -> None:
    server = JobServer(0)
    server.faults = [RuntimeError("Request failed with status code 400")]
    with pytest.raises(RuntimeError, match="400"):
        run(server)


def test_outputs_that_would_be_lost_with_the_unpacked_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    unpacked.mkdir(parents=True)
    inputs = ["images=photos", "head=heads/first"]
    assert load_config(HeatmapsConfig, [*inputs, "output=out"], doc="").config.output == "out"
    monkeypatch.chdir(unpacked)
    with pytest.raises(ConfigError, match=r'output: "out" is relative, .* give the full path'):
        load_config(HeatmapsConfig, [*inputs, "output=out"], doc="")
    for output in ("/mnt/shared/out", "s3://bucket/out", "~/out"):
        assert load_config(HeatmapsConfig, [*inputs, f"output={output}"], doc="").config.output == output
    training = ["ratings.path=r.csv", "backbone.name=vgg16", "output=/mnt/heads/first", "cache=embeddings"]
    with pytest.raises(ConfigError, match='cache: "embeddings" is relative'):
        load_config(TrainConfig, training, doc="")
