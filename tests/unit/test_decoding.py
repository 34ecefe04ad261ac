"""Decoding in child processes: equal to decoding here, and whatever an image does to its child, one image pays.

What is faked: bugs in decoders (`tests/hostile`, which says how). The processes, their deaths and limits are real.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ais.decoding import Decoded, DecoderPool, Decoding
from ais.errors import ImageError
from ais.images import Geometry, Limits
from tests.zoo import DEADLY, HOSTILE_PATH, ZOO_LIMITS, deadly, write_zoo

DECODING = Decoding(Geometry(32, 36, "bilinear"), ZOO_LIMITS, max_side=40)
QUICK = Decoding(DECODING.geometry, Limits(seconds=1))  # ten by the clock, which a busy machine may reach first
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Image size")
ROOT = Path(__file__).parents[2]


def outcome(decode: object, data: bytes, picture: bool = False) -> Decoded | tuple[str, str]:
    try:
        found: Decoded = decode(data, picture)  # type: ignore[operator]
    except ImageError as error:
        return error.stage, error.reason
    return found


def children_of(pid: int) -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and int(Path(entry, "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def decoders_of(pid: int) -> list[int]:
    """Those of its children that decode; servers and a Ray of other tests may be there too."""
    return [
        child
        for child in children_of(pid)
        if b"ais.decoding import serve" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.fixture(scope="module")
def hostile() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HOSTILE_PATH, prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def pool(hostile: None) -> Iterator[DecoderPool]:  # noqa: ARG001
    pool = DecoderPool(DECODING, 2)
    yield pool
    pool.close()


def test_equals_decoding_here_in_many_threads(pool: DecoderPool, tmp_path: Path) -> None:
    files = [case.path.read_bytes() for case in write_zoo(tmp_path)]
    wanted = [number % 3 == 0 for number in range(len(files))]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda data, picture: outcome(pool.decode, data, picture), files, wanted))
    decoded = 0
    for data, picture, there in zip(files, wanted, found, strict=True):
        here = outcome(DECODING, data, picture)
        if isinstance(here, tuple) or isinstance(there, tuple):
            assert here == there
            continue
        decoded += 1
        assert (there.width, there.height) == (here.width, here.height)
        np.testing.assert_array_equal(there.pixels, here.pixels)
        np.testing.assert_array_equal(there.box, here.box)
        assert there.box.dtype == np.float32
        assert (there.picture is None) == (not picture)
        if here.picture is not None:
            np.testing.assert_array_equal(there.picture, here.picture)
    assert decoded > 30
    assert len(decoders_of(os.getpid())) <= 2


def test_every_way_to_end_a_decoder_costs_one_image(hostile: None) -> None:  # noqa: ARG001
    pool = DecoderPool(QUICK, 2)
    good = deadly("nothing")
    ways = [way for way in DEADLY if way != "sleep"]
    images = [image for way in ways for image in (good, deadly(way), good)]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda data: outcome(pool.decode, data), images))
    for number, way in enumerate(ways):
        before, refused, after = found[3 * number : 3 * number + 3]
        assert refused == ("decode", DEADLY[way].value), way
        assert isinstance(before, Decoded), way
        assert isinstance(after, Decoded), way
    with pytest.raises(ImageError, match="out of memory: its decoder died twice, of SIGKILL"):  # as the system does it
        pool.decode(deadly("killed"))
    with pytest.raises(ImageError, match="crashed: its decoder died twice, of SIGSEGV"):
        pool.decode(deadly("segfault"))
    with pytest.raises(ImageError, match=r"too slow: over 1 s of processor time|too slow: over 10 s by the clock"):
        pool.decode(deadly("spin"))
    pool.close()


def test_what_hangs_without_computing_is_stopped_by_the_clock(hostile: None) -> None:  # noqa: ARG001
    pool = DecoderPool(Decoding(DECODING.geometry, Limits(seconds=0.1)), 1)
    with pytest.raises(ImageError, match="too slow: over 1 s by the clock"):
        pool.decode(deadly("sleep"))
    pool.close()


def test_the_victim_of_another_is_decoded_by_the_next_child(pool: DecoderPool) -> None:
    good = deadly("nothing")
    expected = pool.decode(good)
    before = set(children_of(os.getpid()))
    pool.decode(good)
    for pid in before:
        if "ais.decoding" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    for _ in range(3):
        np.testing.assert_array_equal(pool.decode(good).pixels, expected.pixels)


def test_an_answer_that_was_not_read_to_its_end_is_no_answer_to_the_next_image(hostile: None) -> None:  # noqa: ARG001
    pool = DecoderPool(DECODING, 1)
    good = deadly("nothing")
    expected = pool.decode(good)
    read_only = np.empty_like(expected.pixels)
    read_only.flags.writeable = False
    with pytest.raises(TypeError):
        pool.decode(good, into=read_only)
    np.testing.assert_array_equal(pool.decode(good).pixels, expected.pixels)
    pool.close()


def test_children_hold_no_credentials(hostile: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    secrets = {"AWS_SECRET_ACCESS_KEY": "hidden-1", "azure_storage_sas_token": "hidden-2", "HF_TOKEN": "hidden-3"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    pool = DecoderPool(DECODING, 1)
    pool.decode(deadly("nothing"))
    [pid] = pool.pids()
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"hidden-" not in environment
    assert b"PATH=" in environment
    pool.close()
    assert pool.pids() == []


def test_children_import_no_torch_and_no_ray_and_end_with_their_parent(hostile: None) -> None:  # noqa: ARG001
    script = """
import os, signal, sys, threading, time
sys.path.insert(0, "")
from tests.unit.test_decoding import QUICK, children_of
from tests.zoo import deadly
from ais.decoding import DecoderPool
pool = DecoderPool(QUICK, 4)
pool.decode(deadly("nothing"))
[idle] = children_of(os.getpid())
maps = open(f"/proc/{idle}/maps").read()
print("torch" in maps, "/ray/" in maps, "numpy" in maps, idle, flush=True)
threading.Thread(target=pool.decode, args=(deadly("spin"),), daemon=True).start()
threading.Thread(target=pool.decode, args=(deadly("spin"),), daemon=True).start()
threading.Thread(target=pool.decode, args=(deadly("spin"),), daemon=True).start()
while len(children_of(os.getpid())) < 3:
    time.sleep(0.05)
print(*children_of(os.getpid()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    torch, ray, numpy, idle, *pids = done.stdout.split()
    assert (torch, ray, numpy) == ("False", "False", "True"), done.stderr
    assert idle in pids
    assert len(pids) >= 2
    end = time.monotonic() + 120  # those that spin have a second of processor time
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < end, f"{left} still there"
        time.sleep(0.1)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
