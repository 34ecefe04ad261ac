"""Addresses: local paths, ``s3://`` and every other fsspec scheme, read and written the same way."""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from ais.errors import StorageError, WeightsError


@dataclass(frozen=True)
class Storage:
    """How to reach object storage; plain data, so that it travels to Ray workers.

    Secrets are not here: they come from the environment or the usual AWS files, wherever the code runs.

    Args:
        endpoint_url: of an S3 service other than AWS.
        profile: of the AWS configuration files.
        anonymous: do not sign requests.
        requester_pays: accept the charges of requester-pays buckets.
        max_connections: size of the connection pool of one process (botocore's own default is 10).
    """

    endpoint_url: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    max_connections: int = 64

    def options(self, address: str) -> dict[str, Any]:
        """Return the fsspec options for an address; only S3 has any."""
        if scheme(address) not in ("s3", "s3a"):
            return {}
        options: dict[str, Any] = {
            "anon": self.anonymous,
            "requester_pays": self.requester_pays,
            "config_kwargs": {
                "max_pool_connections": self.max_connections,
                "retries": {"max_attempts": 5, "mode": "adaptive"},
            },
        }
        if self.endpoint_url:
            options["endpoint_url"] = self.endpoint_url
        if self.profile:
            options["profile"] = self.profile
        return options

    def open(self, address: str) -> Folder:
        """Return the place that an address names (nothing is read or created yet).

        Raises:
            StorageError: the scheme is not known, or its package is not installed.
        """
        try:
            filesystem = fsspec.filesystem(scheme(address), **self.options(address))
        except (ValueError, ImportError) as error:
            raise StorageError(f"{address!r} cannot be opened: {error}") from error
        path = local_path(address) if is_local(address) else filesystem._strip_protocol(address)
        return Folder(filesystem, path)


_SCHEME = re.compile("^([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def scheme(address: str) -> str:
    """Return the scheme of an address, ``"file"`` for paths.

    fsspec's own parser also splits at ``::``, which is a legal part of file names.
    """
    match = _SCHEME.match(address)
    return match[1].lower() if match else "file"


def is_local(address: str) -> bool:
    """Whether an address is a path of this machine."""
    return scheme(address) in ("file", "local")


def local_path(address: str) -> str:
    """Absolute path of a local address; every character of it is taken literally."""
    return os.path.abspath(os.path.expanduser(_SCHEME.sub("", address)))


def absolute(address: str) -> str:
    """Make a local path absolute (jobs may run elsewhere than where they were started); leave others alone."""
    return local_path(address) if is_local(address) else address.rstrip("/")


@dataclass(frozen=True)
class Folder:
    """A filesystem and a path on it."""

    filesystem: AbstractFileSystem = field(repr=False)
    path: str

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, posixpath.join(self.path, name))

    @property
    def address(self) -> str:
        """The full address, for people and for later opening."""
        return str(self.filesystem.unstrip_protocol(self.path)).removeprefix("file://")

    @property
    def local(self) -> bool:
        """Whether it is on this machine's own filesystem."""
        return isinstance(self.filesystem, LocalFileSystem)

    def exists(self) -> bool:
        """Whether there is a file or folder, asked anew (no listing cache)."""
        self.filesystem.invalidate_cache()
        return bool(self.filesystem.exists(self.path))

    def read_bytes(self, limit: int | None = None) -> bytes:
        """Read a whole file; with ``limit``, at most ``limit + 1`` bytes, so that the caller can tell."""
        if limit is None:
            return bytes(self.filesystem.cat_file(self.path))
        with self.filesystem.open(self.path, "rb", cache_type="none") as file:
            return bytes(file.read(limit + 1))

    def write_bytes(self, data: bytes) -> None:
        """Write a whole file so that the final name only ever holds all of it.

        Object stores do this by themselves; a local file is written beside its place and renamed.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            if self.local:
                self._write_local(data)
            else:
                self.filesystem.pipe_file(self.path, data)
        except Exception as error:  # each filesystem raises its own kinds
            raise StorageError(f"{self.address!r} cannot be written: {type(error).__name__}: {error}") from error

    def _write_local(self, data: bytes) -> None:
        final = Path(self.path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)

    def write_text(self, text: str) -> None:
        """Write UTF-8 text, as `write_bytes`."""
        self.write_bytes(text.encode())

    def files(self, pattern: str = "*") -> list[Folder]:
        """Files directly inside that match, sorted by name; none if the folder does not exist."""
        self.filesystem.invalidate_cache()
        try:
            entries = self.filesystem.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = [str(entry["name"]) for entry in entries if entry["type"] == "file"]
        names = fnmatch.filter((posixpath.basename(path) for path in paths), pattern)
        return [self / name for name in sorted(names)]

    def remove(self) -> None:
        """Delete this file."""
        self.filesystem.rm_file(self.path)


def default_cache() -> Path:
    """Where downloaded weights are kept: ``$XDG_CACHE_HOME/ais`` or ``~/.cache/ais``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ais"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(address: str, sha256: str | None, storage: Storage, cache: Path | None = None) -> tuple[Path, str]:
    """Bring a file to this machine, once, and check its digest.

    Local files stay where they are. Others are kept under the cache folder; processes that start together wait for
    the first one. Where no digest is expected, the one seen at the first download is kept beside the file and
    holds from then on.

    Args:
        address: local path or any fsspec address.
        sha256: expected digest, or a prefix of it.
        storage: how to reach it.
        cache: folder for downloads; `default_cache` if not given.

    Returns:
        the local path and the full SHA-256.

    Raises:
        WeightsError: it cannot be read, or the digest is another.
    """
    if is_local(address):
        path = Path(local_path(address))
        if not path.is_file():
            raise WeightsError(f"{address!r} is not a file")
        digest = sha256_of(path)
        _check_digest(address, digest, sha256)
        return path, digest
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    folder = (cache or default_cache()) / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}-{posixpath.basename(address)}"
    seen = path.with_name(path.name + ".sha256")
    with _locked(path.with_name(path.name + ".lock")):
        if path.exists() and seen.exists():
            digest = sha256_of(path)
            _check_digest(str(path), digest, seen.read_text().strip())
        else:
            partial = path.with_name(path.name + ".partial")
            try:
                source = storage.open(address)
                source.filesystem.get_file(source.path, str(partial))
            except Exception as error:  # each filesystem raises its own kinds
                partial.unlink(missing_ok=True)
                raise WeightsError(
                    f"{address!r} cannot be fetched ({type(error).__name__}: {error}); give the address of a copy that "
                    f"this machine reaches, or choose weights=random explicitly"
                ) from error
            digest = sha256_of(partial)
            try:
                _check_digest(address, digest, sha256)
            except WeightsError:
                partial.unlink()
                raise
            partial.replace(path)
            seen.write_text(digest + "\n")
    _check_digest(address, digest, sha256)
    return path, digest


def _check_digest(address: str, found: str, expected: str | None) -> None:
    if expected is not None and not found.startswith(expected.lower()):
        raise WeightsError(
            f"{address!r} has SHA-256 {found}, expected {expected}: the file is damaged or not the one that was meant"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes of one machine; the system releases it if the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
