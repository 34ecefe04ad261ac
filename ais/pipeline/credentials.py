"""The driver's way to S3 for workers on machines that have none of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping

# Of AWS's variables those that mean the same on every machine. Profiles, files and web identities are a machine's own.
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


def worker_setup() -> Callable[[], None] | None:
    """Return what a worker process runs first to adopt the driver's S3 variables, or ``None`` where there are none.

    For ``runtime_env={"worker_process_setup_hook": …}``. A function, whose values Ray keeps pickled in the head's
    store: ``env_vars`` would be written to its logs and shown in its dashboard.
    """
    found = {name: os.environ[name] for name in (*_KEYS, *_PLACES) if os.environ.get(name)}
    if not found:
        return None

    def setup() -> None:
        adopt(found, os.environ)

    return setup


def adopt(found: dict[str, str], environment: MutableMapping[str, str]) -> None:
    """Take over variables that this machine has not set itself; keys all together or not at all."""
    if any(name in environment for name in _KEYS):
        found = {name: value for name, value in found.items() if name not in _KEYS}
    for name, value in found.items():
        environment.setdefault(name, value)
