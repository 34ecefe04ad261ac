"""Submit a job to a Ray cluster and exit with its result: what a scheduler calls.

    python cluster/submit.py --tick 2026-11-25 -- python jobs/score.py --config configs/score.yaml

The same command for the same tick is the same submission: whoever calls second, or again after a crash, follows the job
that is there instead of starting another. A job that died, or ended with 1 (work was started and did not end well), is
submitted again, at most ATTEMPTS times in all; every other exit code of the job is this program's.

The cluster's address comes from --address or RAY_API_SERVER_ADDRESS, and RAY_AUTH_MODE=token with RAY_AUTH_TOKEN (or
RAY_AUTH_MODE=disabled) has to be what the cluster was started with.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

_EVERY_S = 2.0
GAVE_UP = 75  # EX_TEMPFAIL: nothing is known of the job, and asking again later may help
_AGAIN = (None, 1)  # exit codes of a job after which the same command may go further; None: its driver died
_Answer = TypeVar("_Answer")


class Unreachable(Exception):
    """The cluster did not answer for as long as it was given."""


def submission_id(command: Sequence[str], tick: str) -> str:
    """Return the id of a command at a tick: another command, other content of its configuration, or another tick give
    another id.

    Args:
        command: with the job's file among its words, and maybe ``--config FILE``.
        tick: of the schedule, such as a date.

    Raises:
        ValueError: the job or its configuration is not there.
    """
    digest = hashlib.sha256("\0".join(command).encode())
    job = next((word for word in command if word.endswith(".py")), None)
    if job is None or not Path(job).is_file():
        raise ValueError(f"{shlex.join(command)}: there is no file of a job in it, such as jobs/score.py")
    if (config := config_of(command)) is not None:
        if not config.is_file():
            raise ValueError(f"--config {config}: there is no such file")
        digest.update(config.read_bytes())
    return re.sub(r"[^\w.-]", "-", f"{Path(job).stem}-{tick}-{digest.hexdigest()[:12]}")


def config_of(command: Sequence[str]) -> Path | None:
    """Return the file that a command names with ``--config``."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--config":
            return Path(following)
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


class Submitter:
    """Submits and follows.

    Args:
        client: of the cluster.
        patience_s: seconds without an answer from the cluster after which it gives up.
    """

    def __init__(self, client: JobSubmissionClient, patience_s: float) -> None:
        self._client = client
        self._patience_s = patience_s

    def run(self, command: Sequence[str], identity: str, attempts: int, working_dir: str | None) -> int:
        """Submit, or follow what was submitted, until it ends well or has been tried often enough.

        Returns:
            the exit code of the last attempt.
        """
        code: int | None = None
        for attempt in range(1, attempts + 1):
            name = identity if attempt == 1 else f"{identity}.{attempt}"
            code = self._once(command, name, working_dir)
            if code not in _AGAIN:
                return code if code is not None else 1
            _say(f"{name} {'died' if code is None else f'ended with {code}'}, attempt {attempt} of {attempts}")
        return code or 1

    def _once(self, command: Sequence[str], name: str, working_dir: str | None) -> int | None:
        if self._find(name) is None:
            _say(f"submitting {name}: {shlex.join(command)}")
            runtime_env = {"working_dir": working_dir} if working_dir else {}
            self._ask(lambda: self._submit(command, name, runtime_env))
        else:
            _say(f"{name} was submitted before; following it")
        return self._follow(name)

    def _submit(self, command: Sequence[str], name: str, runtime_env: dict[str, str]) -> None:
        try:
            self._client.submit_job(entrypoint=shlex.join(command), submission_id=name, runtime_env=runtime_env)
        except RuntimeError as error:
            # Somebody was faster, or the answer to an earlier try was lost.
            if "already exists" not in str(error):
                raise

    def _find(self, name: str) -> JobDetails | None:
        return self._ask(
            lambda: next((job for job in self._client.list_jobs() if job.submission_id == name), None),
        )

    def _follow(self, name: str) -> int | None:
        """Print the job's log as it grows; return its exit code, or ``None`` if its driver was lost."""
        printed = 0
        while True:
            job = self._find(name)
            if job is None:
                return None  # the head was replaced, and knows nothing of it
            log = self._ask(lambda: self._client.get_job_logs(name))
            print(log[printed:], end="", flush=True)
            printed = len(log)
            if job.status == JobStatus.SUCCEEDED:
                return 0
            if job.status == JobStatus.STOPPED:
                _say(f"{name} was stopped by somebody")
                return 130
            if job.status == JobStatus.FAILED:
                _say(f"{name} failed: {(job.message or '').strip().splitlines()[:1]}")
                # A signal ended the driver.
                return job.driver_exit_code if (job.driver_exit_code or 0) > 0 else None
            time.sleep(_EVERY_S)

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        """Ask until there is an answer: a head may be restarting."""
        end = time.monotonic() + self._patience_s
        while True:
            try:
                return question()
            except (OSError, RuntimeError) as error:  # Ray raises RuntimeError for every answer but 200
                if isinstance(error, RuntimeError) and "status code 5" not in str(error):
                    raise
                if time.monotonic() > end:
                    raise Unreachable(str(error)) from error
                time.sleep(_EVERY_S)


def _say(text: str) -> None:
    print(f"submit: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Read the command line, submit, follow; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="the job's command follows after --",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tick", required=True, help="of the schedule, such as a date: one submission each")
    parser.add_argument("--address", help="of the dashboard, such as http://127.0.0.1:8265")
    parser.add_argument("--attempts", type=int, default=3, help="submissions in all (default 3)")
    parser.add_argument("--patience", type=float, default=300, metavar="S", help="without an answer (default 300 s)")
    parser.add_argument("--working-dir", default=".", help="folder that goes along; 'none': the image has the code")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    index = argv.index("--") if "--" in argv else len(argv)
    arguments, command = parser.parse_args(argv[:index]), argv[index + 1 :]
    try:
        identity = submission_id(command, arguments.tick)
    except ValueError as error:
        parser.error(str(error))
    address = arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if arguments.dry_run:
        print(f"submission  {identity}\naddress     {address}\ncommand     {shlex.join(command)}")
        return 0
    if not address:
        parser.error("--address: required, unless RAY_API_SERVER_ADDRESS is set")
    end = time.monotonic() + arguments.patience
    while True:
        try:
            client = JobSubmissionClient(address)
            break
        except AuthenticationError as error:
            _say(f"the cluster refuses RAY_AUTH_MODE and RAY_AUTH_TOKEN: {str(error).splitlines()[0]}")
            return 2
        except OSError as error:
            if time.monotonic() > end:
                _say(f"{address} cannot be reached: {error}")
                return GAVE_UP
            time.sleep(_EVERY_S)
    working_dir = None if arguments.working_dir == "none" else arguments.working_dir
    try:
        return Submitter(client, arguments.patience).run(command, identity, arguments.attempts, working_dir)
    except Unreachable as error:
        _say(f"the cluster does not answer: {error}; the same command follows the job later")
        return GAVE_UP
    except RuntimeError as error:
        _say(f"the cluster refuses: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
