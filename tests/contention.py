"""Several that want one lock at the same moment."""

import threading
import time
from collections.abc import Callable

from ais.errors import LockedError
from ais.lease import Fence, Lease, hold
from ais.storage import Folder


def contend(
    folder: Folder,
    contenders: int,
    lease_s: float,
    seconds: float,
    meanwhile: Callable[[], object] = lambda: None,
    at_last: Callable[[Lease], object] = lambda _: None,
) -> list[Fence]:
    """Let threads take a lock at once; those that get it keep it until the others were told that it is held.

    Args:
        folder: that they want to write.
        contenders: number of threads.
        lease_s: of their leases.
        seconds: after which nobody is waited for any more.
        meanwhile: called when only one is left.
        at_last: called by whoever has the lock, before giving it back.

    Returns:
        what those that got it had.

    Raises:
        Exception: what one of them met, other than that the lock is held.
    """
    got: list[Fence] = []
    failed: list[Exception] = []
    gate, done = threading.Barrier(contenders), threading.Event()

    def want() -> None:
        gate.wait()
        try:
            with hold(folder, lease_s=lease_s) as lease:
                got.append(lease.fence)
                done.wait()
                at_last(lease)
        except LockedError:
            pass
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=want) for _ in range(contenders)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    while sum(thread.is_alive() for thread in threads) > 1 and time.monotonic() < end:
        time.sleep(0.02)
    try:
        meanwhile()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    return got
