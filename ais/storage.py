"""Addresses: local paths, ``s3://`` and every other fsspec scheme, read and written the same way."""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import posixpath
import random
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from ais.errors import AisError, ChangedError, RunError, StorageError, WeightsError
from ais.secrets import redact, refuse_secrets

# Three layers try again: botocore a request, s3fs a whole answer (a body that ended early), and `tried` what neither
# knows as passing, and every other filesystem.
_BOTOCORE_TRIES = 3
_TRIES = 4
_FIRST_WAIT_S = 0.2
_PATIENCE_S = 30.0
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_WEB_PART_BYTES = 2**20
# What no second try changes: our own mistakes, full disks, and what a server refuses with a reason.
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_LASTING_ERRNOS = frozenset(
    (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG)
)
_PASSING_HTTP = frozenset((408, 425, 429))

T = TypeVar("T")


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
        options: of other filesystems, each ``scheme.option=value``, such as ``gs.project=photos``; passed to fsspec.
    """

    endpoint_url: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    max_connections: int = 64
    options: tuple[str, ...] = ()

    def options_of(self, address: str) -> dict[str, Any]:
        """Return the fsspec options for an address."""
        used = scheme(address)
        options: dict[str, Any] = {}
        for option in self.options:
            name, _, value = option.partition("=")
            option_scheme, _, key = name.partition(".")
            if option_scheme == used:
                options[key] = _SCALARS.get(value, value)
        if used not in ("s3", "s3a"):
            return options
        options |= {
            "anon": self.anonymous,
            "requester_pays": self.requester_pays,
            "use_listings_cache": False,  # it keeps every listing whole, and stale
            "config_kwargs": {
                "max_pool_connections": self.max_connections,
                "retries": {"total_max_attempts": _BOTOCORE_TRIES, "mode": "standard"},
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "read_timeout": _READ_TIMEOUT_S,
                **self._checksums(),
            },
        }
        if self.endpoint_url:
            options["endpoint_url"] = self.endpoint_url
        if self.profile:
            options["profile"] = self.profile
        return options

    def _checksums(self) -> dict[str, str]:
        """Botocore's checksums, only where S3 itself requires them, for servers other than AWS.

        Some do not know those of requests, and rclone's answers a range with the checksum of the whole object. The
        variables ``AWS_REQUEST_CHECKSUM_CALCULATION`` and ``AWS_RESPONSE_CHECKSUM_VALIDATION`` say otherwise.
        """
        others = self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        kinds = ("request_checksum_calculation", "response_checksum_validation")
        return {kind: "when_required" for kind in kinds if others and f"AWS_{kind.upper()}" not in os.environ}

    def for_threads(self, threads: int) -> Storage:
        """The same, with a connection at least for each of so many threads of a process."""
        return replace(self, max_connections=max(self.max_connections, threads))

    def open(self, address: str) -> Folder:
        """Return the place that an address names (nothing is read or created yet).

        Raises:
            StorageError: the scheme is not known, its package is not installed or does not work here, or the address
                carries a secret.
        """
        try:
            refuse_secrets(address)
            filesystem = fsspec.filesystem(scheme(address), **self.options_of(address))
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise StorageError(
                f"{redact(address)!r} cannot be opened: {redact(' '.join(str(error).split()))}; "
                "check its scheme, or install the package for it"
            ) from error
        path = local_path(address) if is_local(address) else filesystem._strip_protocol(address)
        return Folder(filesystem, path)


_SCALARS: dict[str, Any] = {"true": True, "false": False, "null": None}


def is_passing(error: BaseException) -> bool:
    """Whether a failed request may succeed when it is tried again.

    Throttling, timeouts, resets, bodies that end early and errors of the server (5xx) pass; what is missing or
    forbidden (404, 403), a full disk, and whatever is wrong with the request itself do not.
    """
    if isinstance(error, (*_LASTING, AisError)) or not isinstance(error, Exception):
        return False
    status = getattr(error, "status", None)  # of aiohttp
    if isinstance(status, int) and 400 <= status < 500:
        return status in _PASSING_HTTP
    if isinstance(error, OSError) and error.errno in _LASTING_ERRNOS:
        return _s3_code(error) in _DAMAGED_ON_THE_WAY
    if isinstance(error, (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, ImportError)):
        return False
    return type(error).__name__ not in _LASTING_BOTOCORE


def _s3_code(error: Exception) -> str:
    """The code of S3's answer that an error of s3fs was made of."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


# What arrived at S3 was not what was sent; s3fs has no other kind for it than "invalid".
_DAMAGED_ON_THE_WAY = frozenset(
    ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
)
# By name: botocore need not be installed for local files.
_LASTING_BOTOCORE = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError", "InvalidConfigError")
)


def tried(action: Callable[[], T]) -> T:
    """Do what can be done twice, again after a passing fault, up to four times with growing waits.

    The waits are drawn by chance, so that many workers that failed together do not come back together.

    Raises:
        Exception: what the action raises, of the last try, or of the first that no other try would change.
    """
    started = time.monotonic()
    for attempt in range(_TRIES):
        try:
            return action()
        except Exception as error:  # every filesystem raises its own kinds
            last = attempt == _TRIES - 1 or time.monotonic() - started > _PATIENCE_S
            if last or not is_passing(error):
                raise
            time.sleep(_FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


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


# What filesystems call the content type of an object.
_CONTENT_TYPE = {"s3": "ContentType", "s3a": "ContentType", "gs": "content_type", "gcs": "content_type"}


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

    @property
    def on_s3(self) -> bool:
        """Whether it is on S3 or a store that speaks its language."""
        return "s3" in self.filesystem.protocol

    def exists(self) -> bool:
        """Whether there is a file or folder, asked anew (no listing cache).

        Raises:
            StorageError: the store does not say.
        """
        self.filesystem.invalidate_cache()
        with reading(self):
            return bool(tried(lambda: self.filesystem.exists(self.path)))

    def read_bytes(self, limit: int | None = None, *, etag: str | None = None) -> bytes:
        """Read a whole file; with ``limit``, at most ``limit + 1`` bytes, so that the caller can tell.

        Passing faults are tried again (`is_passing`); a body shorter than was announced is one.

        Args:
            limit: in bytes.
            etag: that the object has to have still; asked with the read itself, of S3 only.

        Raises:
            ChangedError: the object has another etag.
            Exception: whatever the filesystem raises.
        """
        if self.local:
            with open(self.path, "rb") as file:
                return file.read() if limit is None else file.read(limit + 1)
        if etag is not None and self.on_s3:
            return tried(lambda: self._read_version(limit, etag))
        return tried(lambda: self._read_remote(limit))

    def _read_version(self, limit: int | None, etag: str) -> bytes:
        """Read an object of S3 if it still has this etag; s3fs has no way to say so."""
        bucket, key, _ = self.filesystem.split_path(self.path)
        condition = {"IfMatch": f'"{etag}"'} | ({} if limit is None else {"Range": f"bytes=0-{limit}"})

        async def read() -> bytes:
            answer = await self.filesystem._call_s3("get_object", Bucket=bucket, Key=key, **condition)
            async with answer["Body"] as body:
                if (found := str(answer.get("ETag", "")).strip('"')) != etag:  # some servers ignore the condition
                    raise ChangedError(f"its etag is no longer {etag} but {found or 'none'}")
                return bytes(await body.read())

        try:
            return sync(self.filesystem.loop, read)
        except OSError as error:
            code = _s3_code(error)
            if code in ("PreconditionFailed", "412"):
                raise ChangedError(f"its etag is no longer {etag}") from error
            if code in ("InvalidRange", "416"):
                return b""  # an empty object has no range to give
            raise

    def _read_remote(self, limit: int | None) -> bytes:
        if "http" in self.filesystem.protocol:
            return self._read_web(limit)
        if not self.on_s3:
            if limit is None:
                return bytes(self.filesystem.cat_file(self.path))
            with self.filesystem.open(self.path, "rb", cache_type="none") as file:
                return bytes(file.read(limit + 1))
        # One request; s3fs would ask for the size first, for files and for whole objects alike.
        if limit is None:
            return bytes(self.filesystem.cat_file(self.path, max_concurrency=1))
        try:
            return bytes(self.filesystem.cat_file(self.path, start=0, end=limit + 1))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if self.filesystem.info(self.path)["size"]:  # an empty object has no range to give
                raise
            return b""

    def _read_web(self, limit: int | None) -> bytes:
        # As a stream, whose size is not asked for: fsspec takes every failure of that question for a missing file.
        left = sys.maxsize if limit is None else limit + 1
        parts = []
        try:
            with self.filesystem.open(self.path, "rb", block_size=0, size=1) as file:
                while left and (part := file.read(min(left, _WEB_PART_BYTES))):
                    parts.append(part)
                    left -= len(part)
        except Exception as error:  # of aiohttp, which need not be installed for other addresses
            if getattr(error, "status", None) in (401, 403):
                raise PermissionError(explain(error)) from error
            raise
        return b"".join(parts)

    def write_bytes(self, data: bytes, content_type: str | None = None) -> None:
        """Write a whole file so that the final name only ever holds all of it.

        Object stores do this by themselves; a local file is written beside its place and renamed. Passing faults are
        tried again: the same bytes under the same name, whether or not the first try arrived.

        Args:
            data: all of it.
            content_type: what an object store tells browsers that it is; without one they save a page, not show it.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            if self.local:
                self._write_local(data)
            else:
                protocol = self.filesystem.protocol
                known = _CONTENT_TYPE.get(protocol if isinstance(protocol, str) else protocol[0])
                options = {known: content_type} if known and content_type else {}
                tried(lambda: self.filesystem.pipe_file(self.path, data, **options))
        except Exception as error:  # each filesystem raises its own kinds
            raise StorageError(
                f"{self.address!r} cannot be written: {explain(error)}; "
                "check the address, its permissions and the space"
            ) from error

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
            _keep_names(final.parent)
        finally:
            partial.unlink(missing_ok=True)

    def write_text(self, text: str) -> None:
        """Write UTF-8 text, as `write_bytes`."""
        self.write_bytes(text.encode())

    def files(self, pattern: str = "*") -> list[Folder]:
        """Files directly inside that match, sorted by name; none if the folder does not exist.

        Raises:
            StorageError: it cannot be listed.
        """
        self.filesystem.invalidate_cache()
        try:
            with reading(self):
                entries = tried(lambda: self.filesystem.ls(self.path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = [str(entry["name"]) for entry in entries if entry["type"] == "file"]
        names = fnmatch.filter((posixpath.basename(path) for path in paths), pattern)
        return [self / name for name in sorted(names)]

    def remove_unfinished(self) -> None:
        """Delete what writers that were killed left here: partial files, and on S3 parts of uploads never completed.

        Nobody may be writing here. What cannot be deleted stays: it has no final name and does no harm.
        """
        with suppress(Exception):
            for partial in self.files(".*.partial"):
                partial.remove()
        if not self.on_s3:
            return
        with suppress(Exception):
            bucket, prefix, _ = self.filesystem.split_path(self.path)
            found = self.filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
            for upload in found.get("Uploads", ()):
                self.filesystem.call_s3(
                    "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def remove(self) -> None:
        """Delete this file.

        Raises:
            FileNotFoundError: it is not there.
            StorageError: it cannot be deleted.
        """
        try:
            tried(lambda: self.filesystem.rm_file(self.path))
        except FileNotFoundError:
            raise
        except Exception as error:  # each filesystem raises its own kinds
            raise StorageError(
                f"{self.address!r} cannot be deleted: {explain(error)}; check the permissions of its folder"
            ) from error


def _keep_names(folder: Path) -> None:
    """Bring the names in a folder to the disk: without, a renamed file may have its old name after a power failure."""
    with suppress(OSError):  # not every filesystem can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def explain(error: BaseException) -> str:
    """What an error of a filesystem says, on one line, without secrets."""
    name = type(error).__name__
    said = " ".join(str(error).split())
    return redact(f"{name}: {said}" if said else name)


@contextmanager
def reading(place: Folder) -> Iterator[None]:
    """Say which address could not be read, and why, whatever kind of error its filesystem raises.

    Raises:
        StorageError: in place of every other error but that there is nothing.
    """
    try:
        yield
    except (AisError, FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:
        raise StorageError(
            f"{place.address!r} cannot be read: {explain(error)}; check the address and the access to it"
        ) from error


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder of this machine for sorting and for files on their way (``TMPDIR`` says where); deleted at the end.

    Raises:
        StorageError: there is none, or no room in it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=prefix) as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"no room for scratch files in {tempfile.gettempdir()!r}: {explain(error)}; make some, or set TMPDIR to a "
            "folder that has more"
        ) from error


_ANEW = "delete it, and start the same command again"


def read_json(place: Folder, needed: Sequence[str] = (), way_out: str = _ANEW) -> dict[str, Any] | None:
    """Read a small JSON file; ``None`` where there is none.

    Args:
        place: of the file.
        needed: keys that it has to have.
        way_out: what to do about one that cannot be used, for the message.

    Raises:
        RunError: it is no JSON object, or lacks a key.
        StorageError: it cannot be read.
    """
    try:
        with reading(place):
            data = place.read_bytes()
        document = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise RunError(f"{place.address!r} is not JSON: {error}; it was damaged: {way_out}") from error
    check_keys(place, document, needed, way_out)
    found: dict[str, Any] = document
    return found


def check_keys(place: Folder, document: object, needed: Sequence[str], way_out: str) -> None:
    """Refuse a document of another version of this package.

    Raises:
        RunError: it is no JSON object, or lacks a key.
    """
    lacking = [key for key in needed if key not in document] if isinstance(document, dict) else ["everything"]
    if lacking:
        raise RunError(f"{place.address!r} is not as this version writes it, it lacks {lacking[0]}: {way_out}")


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
        WeightsError: there is none that may be read, or the digest is another.
        StorageError: it cannot be fetched, for now, or the cache folder cannot be written.
    """
    if is_local(address):
        path = Path(local_path(address))
        try:
            if not path.is_file():
                raise WeightsError(f"{address!r} is not a file; give a .pth or .safetensors file")
            digest = sha256_of(path)
        except OSError as error:
            raise WeightsError(f"{address!r} cannot be read: {explain(error)}; check its permissions") from error
        _check_digest(address, digest, sha256)
        return path, digest
    endpoint = storage.endpoint_url if scheme(address) in ("s3", "s3a") else None
    key = hashlib.sha256((f"{endpoint} " if endpoint else "").encode() + address.encode()).hexdigest()[:16]
    folder = (cache or default_cache()) / "weights"
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
                tried(lambda: download(source, partial))
                digest = sha256_of(partial)
                _check_digest(address, digest, sha256)
                # The digest first: a file without one is fetched again.
                Folder(LocalFileSystem(), str(seen)).write_text(digest + "\n")
                partial.replace(path)
            except WeightsError:
                raise
            except Exception as error:  # each filesystem raises its own kinds
                gone = isinstance(error, FileNotFoundError | PermissionError)
                raise (WeightsError if gone else StorageError)(
                    f"{address!r} cannot be fetched ({explain(error)}); give the address of a copy that "
                    f"this machine reaches, or choose weights=random explicitly"
                ) from error
            finally:
                partial.unlink(missing_ok=True)
    _check_digest(address, digest, sha256)
    return path, digest


def download(source: Folder, target: Path) -> None:
    """Fetch a whole file to this machine, and count its bytes; one try."""
    source.filesystem.get_file(source.path, str(target))
    if "http" in source.filesystem.protocol:
        return  # the client counts against the header by itself; what is compressed on the way has another size
    size = source.filesystem.info(source.path).get("size")
    if size is not None and target.stat().st_size != size:
        raise OSError(errno.EIO, f"{target.stat().st_size:,} bytes came, there are {size:,}")


def _check_digest(address: str, found: str, expected: str | None) -> None:
    if expected is not None and not found.startswith(expected.lower()):
        raise WeightsError(
            f"{address!r} has SHA-256 {found}, expected {expected}: the file is damaged or not the one that was meant; "
            "fetch it again, or set backbone.sha256 to the right digest"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes of one machine; the system releases it if the holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise StorageError(
            f"the cache {str(path.parent)!r} cannot be written: {explain(error)}; set XDG_CACHE_HOME to a folder that "
            "can be, or give backbone.weights the path of a file"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
