"""An autoscaling Ray cluster on this machine, to see a job scale before it costs anything.

    python cluster/local.py run -- python jobs/heatmaps.py images=photos output=out head=heads/first
    python cluster/local.py up                 # prints what to set in the shell; then any number of commands
    python cluster/local.py down

The head has no CPUs for work. Nodes of two types, `gpu` and `cpu`, come with the demand and go when idle, moved by
Ray's own autoscaler; only their GPUs are imaginary: work on them runs on what this machine has. Everything of the
cluster lives below one folder, and ending it touches no other Ray process. Linux only: it finds its processes in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.local_nodes import HEAD_ID, HEAD_TYPE, INSTANCE_ID_VARIABLE, NODE_ID_VARIABLE

ROOT = Path(__file__).resolve().parent.parent
# In the environment of every process of a cluster, whatever it does to its command line: this is how they are found.
MARK = "AIS_LOCAL_CLUSTER"
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / f"ais-cluster-{os.getuid()}"
_STORE_BYTES = 200 * 2**20
_STOP_WAIT_S = 10


@dataclass(frozen=True)
class NodeType:
    """One kind of worker node.

    Args:
        name: ``"gpu"`` or ``"cpu"``.
        cpus: logical CPUs of each.
        gpus: imaginary GPUs of each.
        most: nodes of this kind, at most; they start at none.
    """

    name: str
    cpus: int
    gpus: int
    most: int


class LocalCluster:
    """An autoscaling cluster on this machine; a context manager.

    Args:
        folder: for everything that it writes; a short path, because sockets lie below it.
        node_types: kinds of worker nodes.
        idle_s: seconds without work after which a node goes.
        dashboard: serve the dashboard, and with it job submission, on loopback.
        environment: variables for every process of the cluster, such as credentials of an object store.
    """

    def __init__(
        self,
        folder: Path,
        node_types: tuple[NodeType, ...] = (NodeType("gpu", 2, 1, 2), NodeType("cpu", 2, 0, 2)),
        *,
        idle_s: float = 15,
        dashboard: bool = True,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self._state = self.folder / "environment.json"
        self.node_types = node_types
        self._idle_s = idle_s
        self._dashboard = dashboard
        self._environment = environment or {}

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the head and its autoscaler.

        Raises:
            RuntimeError: one is running in this folder, or it does not come up.
        """
        if processes_of(self.folder):
            raise RuntimeError(f"a cluster is running in {self.folder}; end it first")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise RuntimeError(f"{self.folder} is not empty; give a folder for the cluster alone, which it removes")
        # Only whoever can read this file can use the cluster: Ray runs any code that it is sent.
        self._state.touch(mode=0o600)
        with _free_ports(6) as ports:
            gcs, dashboard, agent, agent_grpc, client, metrics = ports
        address = f"{_own_ip()}:{gcs}"
        client_environment = {
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        if self._dashboard:
            client_environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
        config = self.folder / "autoscaling.json"
        config.write_text(json.dumps(self._autoscaling(address)))
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
            *("--num-cpus=0", "--num-gpus=0", f"--object-store-memory={_STORE_BYTES}"),
            *(f"--port={gcs}", f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
            *(f"--temp-dir={self.folder / 'ray'}", f"--autoscaling-config={config}"),
            *(f"--include-dashboard={str(self._dashboard).lower()}", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--dashboard-agent-grpc-port={agent_grpc}", f"--labels={self._labels()}"),
        ]
        given = {**without_ray(os.environ), **self._environment}
        environment = {
            **given,
            **{name: value for name, value in client_environment.items() if name.startswith("RAY_AUTH")},
            MARK: str(self.folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            INSTANCE_ID_VARIABLE: HEAD_ID,
            NODE_ID_VARIABLE: HEAD_ID,
            # Where the autoscaler finds the provider.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), given.get("PYTHONPATH")))),
        }
        started = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if started.returncode:
            self.stop()
            raise RuntimeError(f"the cluster does not start:\n{started.stdout}")
        self._state.write_text(json.dumps(client_environment))

    def stop(self) -> None:
        """End every process of the cluster and remove its folder; nothing else is touched."""
        end = time.monotonic() + _STOP_WAIT_S
        while running := processes_of(self.folder):
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                raise RuntimeError(f"processes that do not end: {running}")
            time.sleep(0.1)
        if self._state.exists():  # the folder is a cluster's, whatever we were told
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill_node(self, node_id: str) -> None:
        """Kill one worker node as a reclaimed spot machine dies: its raylet and with it its workers, at once.

        Args:
            node_id: as `ray.nodes` gives it.
        """
        for pid in self.processes_of_node(node_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes_of_node(self, node_id: str) -> list[int]:
        """Ids of the processes of one worker node."""
        return [pid for pid in processes_of(self.folder) if f"{NODE_ID_VARIABLE}={node_id}" in _environment(pid)]

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that make a process join this cluster.

        Raises:
            RuntimeError: it is not running.
        """
        try:
            return dict(json.loads(self._state.read_text()))
        except (FileNotFoundError, ValueError) as error:
            raise RuntimeError(f"no cluster is running in {self.folder}") from error

    def _labels(self) -> str:
        """What tells a job how far this cluster grows."""
        cpus = sum(kind.cpus * kind.most for kind in self.node_types)
        gpus = sum(kind.gpus * kind.most for kind in self.node_types)
        return f"ais.max-cpus={cpus},ais.max-gpus={gpus}"

    def _autoscaling(self, address: str) -> dict[str, Any]:
        types = {
            kind.name: {
                "resources": {"CPU": kind.cpus, "object_store_memory": _STORE_BYTES}
                | ({"GPU": kind.gpus} if kind.gpus else {}),
                "node_config": {},
                "min_workers": 0,
                "max_workers": kind.most,
            }
            for kind in self.node_types
        }
        head = {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0}
        empty: dict[str, list[str]] = {
            name: []
            for name in (
                *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
                *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
                *("rsync_exclude", "rsync_filter"),
            )
        }
        return {
            "cluster_name": "local",
            "provider": {
                "type": "external",
                "module": "cluster.local_nodes.LocalNodes",
                "gcs_address": address,
                "folder": str(self.folder),
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {**types, HEAD_TYPE: head},
            "head_node_type": HEAD_TYPE,
            "max_workers": sum(kind.most for kind in self.node_types),
            "idle_timeout_minutes": self._idle_s / 60,
            "upscaling_speed": 1.0,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **empty,
        }


def without_ray(environment: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """Return the variables that say nothing of another Ray cluster."""
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def processes_of(folder: Path) -> list[int]:
    """Ids of all processes of the cluster in a folder."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if f"{MARK}={folder}" in _environment(pid)]


def _environment(pid: int) -> list[str]:
    """The variables of a process; none of one that has ended, or is not ours to look at."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


@contextlib.contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    """Ports that nobody listens on, all of them different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        yield [one.getsockname()[1] for one in sockets]


def _own_ip() -> str:
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def split_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line at the first ``--``: our options, and the command after it."""
    index = argv.index("--") if "--" in argv else len(argv)
    return argv[:index], argv[index + 1 :]


def main(argv: list[str]) -> int:
    """Start, end, or run a command on a cluster; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down", "run"])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="for everything the cluster writes")
    parser.add_argument("--gpu-nodes", type=int, default=2, help="at most so many nodes with an imaginary GPU")
    parser.add_argument("--cpu-nodes", type=int, default=2, help="at most so many nodes without")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each node")
    parser.add_argument("--idle", type=float, default=15, metavar="S", help="seconds without work until a node goes")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every process of it")
    parser.epilog = "run takes a command, with its own arguments, after --"
    options, command = split_command(argv)
    arguments = parser.parse_args(options)
    types = (
        NodeType("gpu", arguments.cpus, 1, arguments.gpu_nodes),
        NodeType("cpu", arguments.cpus, 0, arguments.cpu_nodes),
    )
    if wrong := [pair for pair in arguments.env if not re.fullmatch(r"[^=]+=.*", pair, re.DOTALL)]:
        parser.error(f"--env {wrong[0]}: expected NAME=VALUE")
    environment = dict(pair.split("=", 1) for pair in arguments.env)
    cluster = LocalCluster(arguments.folder, types, idle_s=arguments.idle, environment=environment)
    if bool(command) != (arguments.action == "run"):
        parser.error("run needs a command after --, and only run takes one")
    if arguments.action == "down":
        cluster.stop()
        return 0
    if arguments.action == "run":
        with cluster:
            return subprocess.run(command, env={**without_ray(os.environ), **cluster.variables}).returncode
    cluster.start()
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in cluster.variables.items()))
    return 0


def _run() -> NoReturn:
    try:
        sys.exit(main(sys.argv[1:]))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _run()
