"""Decoding in child processes: an image that crashes or hangs its decoder costs itself, and nothing else.

Image decoders are C code that reads what strangers wrote. A thread that crashes in it takes its process along, with
every image that process had in hand, and a thread that hangs in it cannot be stopped. So each image is decoded by a
child process that holds only this one: what it does to the child is known to be its own doing.

- A child that dies is replaced and the image tried once more, since the child may have been somebody else's victim;
  the second death is the image's own, and it becomes an `ImageError` ("crashed"). It is never tried a third time.
- A child gets ``limits.seconds`` of processor time for an image (``RLIMIT_CPU``, so that a busy machine does no image
  wrong), and ten times as long by the clock, for what hangs without computing. Then it is killed ("too slow").
- Its memory is bounded by what the largest image allowed may need (``RLIMIT_AS``), and where the machine runs out all
  the same, the kernel is told to kill the child first.
- Children import numpy and Pillow, nothing else, and hold no connection, no open file and no credentials of the
  environment. One that is idle ends when its parent does, because its pipe ends, and one that is busy by its own alarm
  at the latest.

A pool of processes from a library (multiprocessing, pebble, loky) would import the parent's main module in every child,
which in a Ray worker is Ray, and send everything through one queue and a thread of its own.

Both directions use a pipe: a header, then raw bytes. What comes back is read as numbers and text, never unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pickle
import queue
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ais.errors import AisError, ImageError
from ais.images import DecodeReason, Geometry, Limits, decode_scaled
from ais.render import fit_within

_START_S = 300.0  # of a child on a machine that is very busy
_CLOCK_PER_CPU = 10
_PIPE_BYTES = 2**20
# The pixels as decoded, as converted and as composited, twice for what decoders keep beside them, and the interpreter.
_BYTES_PER_PIXEL = 24
_OWN_BYTES = 2**30
_GAP = 2.0
_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from ais.decoding import serve; serve()"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # glibc would give the memory of each image back and get it anew page by page, which costs as much as decoding.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
_SECRET = re.compile("AWS|AZURE|SECRET|TOKEN|KEY|PASSW|CREDENTIAL", re.IGNORECASE)
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Decoded:
    """One image, ready for a backbone.

    Args:
        width: of the original, after its EXIF orientation was applied.
        height: likewise.
        pixels: (S, S, 3) uint8.
        box: (4,) float32, what of the original the pixels show.
        picture: (h, w, 3) uint8 for display, if one was asked for.
    """

    width: int
    height: int
    pixels: np.ndarray
    box: np.ndarray
    picture: np.ndarray | None


@dataclass(frozen=True)
class Decoding:
    """From bytes to pixels; plain data.

    Args:
        geometry: brings an image to the backbone's input.
        limits: on one image.
        max_side: of a picture for display, in pixels.
    """

    geometry: Geometry
    limits: Limits
    max_side: int = 512

    def __call__(self, data: bytes, picture: bool = False) -> Decoded:
        """Decode here, in this process and thread.

        Raises:
            ImageError: the image cannot be used.
        """
        try:
            needed = self._needed(picture) if self.limits.scaled_jpeg else None
            image, (width, height), step = decode_scaled(data, self.limits, needed)
            pixels, box = self.geometry.apply(image)
            box *= step
            shown = fit_within(image, self.max_side) if picture else None
        except MemoryError as error:
            raise ImageError("decode", DecodeReason.OUT_OF_MEMORY, "not enough memory to decode the image") from error
        return Decoded(width, height, pixels, box, shown)

    def _needed(self, picture: bool) -> Callable[[int, int], tuple[float, float]]:
        """Twice the resolution of the input, and that of the picture."""

        def needed(width: int, height: int) -> tuple[float, float]:
            scale = _GAP * self.geometry.scale(width, height)
            if picture:
                scale = max(scale, self.max_side / max(width, height))
            return width * scale, height * scale

        return needed


class DecoderPool:
    """Child processes that decode, for the threads of one process.

    Args:
        decoding: what they do.
        processes: at most; each is started when there is more to do than those before it can.
    """

    def __init__(self, decoding: Decoding, processes: int) -> None:
        children = [_Child(decoding) for _ in range(processes)]
        # The last one used first: what few children can do, few do.
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in children:
            self._idle.put(child)
        self._children = children
        self._finalizer = weakref.finalize(self, _stop, children)

    def decode(self, data: bytes, picture: bool = False, into: np.ndarray | None = None) -> Decoded:
        """Decode in a child; waits for one. Safe to call from many threads.

        Args:
            data: of the file.
            picture: whether one for display is wanted, too.
            into: (S, S, 3) uint8, contiguous; where the pixels go, so that they are not copied again. After an error
                its contents are undefined.

        Raises:
            ImageError: the image cannot be used, or crashed its decoder twice, or took too long, or memory ran out.
        """
        child = self._idle.get()
        try:
            try:
                return child.decode(data, picture, into)
            except _DiedError:
                pass
            try:
                return child.decode(data, picture, into)
            except _DiedError as death:
                # Nobody else sends it: the system does, to children first, when memory runs out. Another time may do.
                killed = str(death) == signal.SIGKILL.name
                reason = DecodeReason.OUT_OF_MEMORY if killed else DecodeReason.CRASHED
                raise ImageError("decode", reason, f"its decoder died twice, of {death}") from None
        finally:
            self._idle.put(child)

    def pids(self) -> list[int]:
        """Of the children that were started and not stopped."""
        return [pid for child in self._children if (pid := child.pid) is not None]

    def close(self) -> None:
        """End the children."""
        self._finalizer()


class _DiedError(Exception):
    """A child is dead; says of what."""


class _Child:
    """A child process, started on first use and again after each death; used by one thread at a time."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def decode(self, data: bytes, picture: bool, into: np.ndarray | None) -> Decoded:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            _send(process.stdin, b"p" if picture else b"-", data)
        except OSError:
            raise _DiedError(self._cause()) from None
        seconds = self._decoding.limits.seconds
        try:
            answer = self._receive(seconds * _CLOCK_PER_CPU, into)
        except TimeoutError:
            self.stop()
            raise _too_slow(f"over {seconds * _CLOCK_PER_CPU:g} s by the clock") from None
        except ImageError:
            raise  # the child's own answer, read to its end
        except BaseException:
            self.stop()  # what is left in its pipe would pass for the answer to the next image
            raise
        if answer is None:
            if (cause := self._cause()) == signal.SIGXCPU.name:
                raise _too_slow(f"over {seconds:g} s of processor time")
            raise _DiedError(cause)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if not _SECRET.search(name)} | _ENVIRONMENT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, AttributeError):  # Linux only, and limited for each user
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._process = process
        ready = False
        with contextlib.suppress(OSError):
            _send(process.stdin, pickle.dumps(self._decoding))
            ready = _readable(process.stdout, _START_S) and process.stdout.read(1) == b"!"
        if not ready:
            raise AisError(
                f"a process that decodes images did not start ({self._cause()}); is memory or a limit short?"
            )
        return process

    def _receive(self, seconds: float, into: np.ndarray | None) -> Decoded | None:
        """What the child answers; ``None`` if it is dead."""
        assert self._process is not None
        pipe = self._process.stdout
        assert pipe is not None
        if not _readable(pipe, seconds):
            raise TimeoutError
        if (header := _read_message(pipe)) is None:
            return None
        said = json.loads(header)
        if "reason" in said:
            raise ImageError("decode", said["reason"], said["detail"])
        side = self._decoding.geometry.input_size
        pixels = np.empty((side, side, 3), np.uint8) if into is None else into
        picture: np.ndarray | None = None
        if said["picture"] is not None:
            height, width = said["picture"]
            picture = np.empty((height, width, 3), np.uint8)
        for array in (pixels, picture):
            if array is not None and not _read_into(pipe, array.data.cast("B")):
                return None
        return Decoded(said["width"], said["height"], pixels, np.array(said["box"], np.float32), picture)

    def _status(self) -> int | None:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(5)  # its pipe ended: it is dead, or about to be
        return None

    def _cause(self) -> str:
        """End it, and say of what it died."""
        status = self._status()
        self.stop()
        if status is None:
            return "closing its pipe"
        return signal.Signals(-status).name if status < 0 else f"exit code {status}"

    def stop(self) -> None:
        """Kill it, if it runs; the next image gets another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        process.wait()


def _stop(children: Sequence[_Child]) -> None:
    for child in children:
        child.stop()


def _too_slow(detail: str) -> ImageError:
    return ImageError("decode", DecodeReason.TOO_SLOW, detail)


def _readable(pipe: Any, seconds: float) -> bool:
    waiting = select.poll()  # select() knows no file descriptor above 1023
    waiting.register(pipe, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _send(pipe: Any, *parts: bytes) -> None:
    pipe.write(_LENGTH.pack(sum(map(len, parts))))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _read_message(pipe: Any) -> bytes | None:
    length = pipe.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        return None
    message: bytes = pipe.read(_LENGTH.unpack(length)[0])
    return message if len(message) == _LENGTH.unpack(length)[0] else None


def _read_into(pipe: Any, target: memoryview) -> bool:
    done = 0
    while done < len(target):
        count = pipe.readinto(target[done:])
        if not count:
            return False
        done += count
    return True


def serve() -> None:
    """Decode what comes on standard input until it ends; the whole life of a child."""
    requests = sys.stdin.buffer
    # Kept from everything that prints: decoders in C write to standard output, too.
    answers = os.fdopen(os.dup(1), "wb", buffering=2**16)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is ours
    with contextlib.suppress(OSError):
        os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"1000")
    if (configuration := _read_message(requests)) is None:
        return
    decoding: Decoding = pickle.loads(configuration)
    _bound_memory(decoding.limits)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file for each hostile image would fill the disk
    with contextlib.suppress(BrokenPipeError):
        answers.write(b"!")
        answers.flush()
        while (message := _read_message(requests)) is not None:
            with _bounded_time(decoding.limits.seconds):
                header, arrays = _answer(decoding, message)
            _send(answers, header)
            for array in arrays:
                answers.write(array.data)
            answers.flush()
    # Without the interpreter's farewell: nothing is held that would be lost.
    os._exit(0)


def _answer(decoding: Decoding, message: bytes) -> tuple[bytes, list[np.ndarray]]:
    try:
        found = decoding(message[1:], picture=message[:1] == b"p")
    except ImageError as error:
        return json.dumps({"reason": error.reason, "detail": error.detail}).encode(), []
    shape = None if found.picture is None else found.picture.shape[:2]
    said = {"width": found.width, "height": found.height, "box": found.box.tolist(), "picture": shape}
    arrays = [found.pixels] if found.picture is None else [found.pixels, found.picture]
    return json.dumps(said).encode(), [np.ascontiguousarray(array) for array in arrays]


def _bound_memory(limits: Limits) -> None:
    bound = _OWN_BYTES + _BYTES_PER_PIXEL * limits.max_pixels + 2 * limits.max_bytes
    with contextlib.suppress(OSError, ValueError):  # not on every platform; a lower bound of the system's stays
        resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextlib.contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    """Let the kernel kill this process: after so much processor time, or long after the parent would have."""
    until = math.ceil(time.process_time() + seconds)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.alarm(math.ceil(seconds * _CLOCK_PER_CPU) + 60)
    yield
    signal.alarm(0)
