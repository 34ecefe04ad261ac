"""Batches in passes that fit into the memory of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Passes:
    """Runs a batch in one pass, or in as many as memory asks for.

    Where a pass runs out of memory its size is halved, and stays so: how much fits depends on backbone, layer, chunk
    and card, and the card knows best.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        """Images in one pass, since a larger one did not fit; ``None`` as long as all did."""

    def run(self, work: Callable[[slice], Result], count: int) -> list[Result]:
        """Call ``work`` for slices that cover ``count`` images, in order; return what it gave.

        Raises:
            torch.OutOfMemoryError: a single image does not fit.
        """
        found: list[Result] = []
        start = 0
        while start < count:
            size = min(count - start, self.limit or count)
            try:
                found.append(work(slice(start, start + size)))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.limit = size // 2
            else:
                start += size
                continue
            # Here and not above: the exception held on to everything that the pass had made.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found
