"""What the C library does with freed memory, in processes of their own, by the pages that the system had to clear."""

import platform
import subprocess
import sys

PROGRAM = """
import resource, sys
import numpy as np
from ais.memory import keep_freed_memory
if "keep" in sys.argv:
    print(keep_freed_memory())
def batch():
    blocks = [np.ones(5 * 2**20) for _ in range(3)]  # 40 MiB each: larger than what glibc ever keeps by itself
batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def said(*arguments: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_freed_memory_is_there_for_the_next_batch() -> None:
    taken, kept = said("keep")
    if platform.libc_ver()[0] != "glibc":
        assert taken == "False", "the setting is glibc's; others are left alone"
        return
    (usual,) = map(int, said())
    assert taken == "True"
    assert usual > 1000, "or the setting has no use here"
    assert int(kept) < usual / 20
