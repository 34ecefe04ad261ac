"""How Ray's autoscaler starts and ends the nodes of `cluster.local`: each is a `ray start` on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

HEAD_TYPE = "head"
HEAD_ID = "f" * 51 + "00000"
# By these variables Ray's autoscaler knows a node again, and we its processes.
NODE_ID_VARIABLE, INSTANCE_ID_VARIABLE = "RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID"
_END_WAIT_S = 15


class LocalNodes(NodeProvider):
    """Nodes on this machine.

    Used instead of Ray's own provider of imaginary nodes, whose nodes share one folder: they unpack the working
    directory of a submitted job over each other's (Ray 2.60). Here every node has its own, as on machines of their own.

    Args:
        provider_config: with ``gcs_address`` and ``folder``.
        cluster_name: not used.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._address = provider_config["gcs_address"]
        self._folder = Path(provider_config["folder"])
        self._lock = threading.RLock()
        self._tags = {HEAD_ID: _tags(HEAD_ID, HEAD_TYPE, NODE_KIND_HEAD)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ids of the nodes that run and have these tags."""
        with self._lock:
            return [
                node
                for node, tags in self._tags.items()
                if self.is_running(node) and tag_filters.items() <= tags.items()
            ]

    def is_running(self, node_id: str) -> bool:
        """Whether a node was started and has not ended."""
        process = self._processes.get(node_id)
        return node_id == HEAD_ID or (process is not None and process.poll() is None)

    def is_terminated(self, node_id: str) -> bool:
        """Whether a node has ended."""
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Tags of a node."""
        return self._tags[node_id]

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Add tags."""
        self._tags[node_id] |= tags

    def external_ip(self, node_id: str) -> str:
        """All nodes have the same address; the id stands for it."""
        return node_id

    def internal_ip(self, node_id: str) -> str:
        """As `external_ip`."""
        return node_id

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],  # noqa: ARG002 - Ray's signature
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],  # noqa: ARG002
    ) -> None:
        """Start nodes."""
        for _ in range(count):
            with self._lock:
                number = len(self._tags)
                node = HEAD_ID[:-5] + f"{number:05d}"
                kind = tags[TAG_RAY_USER_NODE_TYPE]
                self._tags[node] = {**_tags(node, kind, NODE_KIND_WORKER), **tags}
                self._processes[node] = self._start(node, number, kind, resources)

    def _start(self, node: str, number: int, kind: str, resources: dict[str, float]) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={self._address}"),
            *(f"--num-cpus={int(resources['CPU'])}", f"--num-gpus={int(resources.get('GPU', 0))}"),
            f"--object-store-memory={int(resources['object_store_memory'])}",
            *(f"--temp-dir={self._folder / f'n{number}'}", "--dashboard-agent-listen-port=0", "--disable-usage-stats"),
        ]
        environment = {
            **os.environ,
            NODE_ID_VARIABLE: node,
            INSTANCE_ID_VARIABLE: node,
            "RAY_NODE_TYPE_NAME": kind,
        }
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)

    def terminate_node(self, node_id: str) -> None:
        """End a node, with all its processes."""
        process = self._processes[node_id]
        process.terminate()
        try:
            process.wait(_END_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tags(node: str, kind: str, role: str) -> dict[str, str]:
    return {
        TAG_RAY_NODE_KIND: role,
        TAG_RAY_USER_NODE_TYPE: kind,
        TAG_RAY_NODE_NAME: node,
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
    }
