"""What comes back to the driver of a pass over a set; the workers that gather it need no network, and no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource.datasink import WriteResult

from ais.importance.effects import EffectSums
from ais.pipeline.columns import unpack
from ais.pipeline.sink import Unreadable, without_failed


@dataclass
class Gathered:
    """What the write tasks bring to the driver.

    Args:
        sums: of the effects.
        arrays: ``image_id, embedding, replacements`` of each task.
        unreadable: images that could not be used.
    """

    sums: list[EffectSums]
    arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    unreadable: list[Unreadable]


class GatherSink(Datasink[Gathered]):
    """Adds up effects where they are, so that the driver gets one vector a task, or brings coordinates along.

    Args:
        widths: of the columns of vectors: ``score`` and ``effects``, or ``embedding`` and ``replacements``.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        self._widths = widths
        self.gathered = Gathered([], [], [])

    def write(self, blocks: Iterable[Block], ctx: Any) -> Gathered:  # noqa: ARG002 - Ray's signature
        """Reduce the blocks of one task; runs on a worker."""
        result = Gathered([], [], [])
        for block in blocks:
            good, unreadable = without_failed(BlockAccessor.for_block(block).to_arrow())
            result.unreadable += unreadable
            if good.num_rows == 0:
                continue
            values = {name: unpack(good[name], (width,), np.float32) for name, width in self._widths.items()}
            if "effects" in values:
                ratings = good["rating"].to_numpy()
                result.sums.append(EffectSums.of(values["score"][:, 0], values["effects"], ratings))
            else:
                ids = good["image_id"].to_numpy()
                # Copies: what a block is a view of goes with the task.
                result.arrays.append((ids, values["embedding"].copy(), values["replacements"].copy()))
        return result

    def on_write_complete(self, write_result: WriteResult[Gathered]) -> None:
        """Put the tasks together; runs on the driver."""
        for part in write_result.write_returns:
            self.gathered.sums += part.sums
            self.gathered.arrays += part.arrays
            self.gathered.unreadable += part.unreadable
