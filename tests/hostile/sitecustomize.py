"""Makes decoders crash and hang, in the child processes of `ais.decoding` and nowhere else.

What it fakes: a bug in a decoder. No file is known that crashes or hangs the Pillow of today, so its reader of PPM is
replaced by one that does as a comment in the file says. Python imports this module by itself when its folder is on
``PYTHONPATH``, in every process; it changes those that serve as decoders.
"""

import os
import signal
import sys
import time


def obey(order: bytes) -> None:
    if order == b"segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif order == b"abort":
        os.abort()
    elif order == b"exit":
        os._exit(0)
    elif order == b"killed":  # as the kernel does when memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    elif order == b"memory":
        bytearray(2**40)
    elif order == b"spin":
        while True:
            pass
    elif order == b"sleep":
        while True:
            time.sleep(60)


if any("ais.decoding" in argument for argument in sys.orig_argv):
    from PIL import PpmImagePlugin

    read_header = PpmImagePlugin.PpmImageFile._open

    def obey_and_read_header(image: PpmImagePlugin.PpmImageFile) -> None:
        start = image.fp.read(32)
        image.fp.seek(0)
        if start.startswith(b"P6 # "):
            obey(start[5:].partition(b"\n")[0])
        read_header(image)

    PpmImagePlugin.PpmImageFile._open = obey_and_read_header
