"""Images that could not be used, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ais.report.sources import Sources
from ais.secrets import redact
from ais.shards import read_table


@dataclass(frozen=True)
class Failures:
    """Images that could not be used.

    Args:
        count: of all of them.
        reasons: each reason with its stage, its number and a few examples (id, address, message), most frequent first.
    """

    count: int
    reasons: Sequence[dict[str, Any]]


def read_failures(sources: Sources) -> Failures:
    """Count errors by reason and keep a few of each, those with the smallest ids; a shard at a time.

    Raises:
        RunError: a shard is damaged.
        StorageError: one cannot be read.
    """
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for shard in sources.run.errors.files("*.parquet"):
        table = read_table(shard, ["image_id", "uri", "stage", "reason", "error"])
        for row in table.to_pylist():
            key = row["stage"], row["reason"]
            counts[key] += 1
            kept = examples.setdefault(key, [])
            kept.append((row["image_id"], row["uri"], row["error"]))
            if len(kept) > 2 * sources.config.gallery.errors + 16:
                examples[key] = sorted(kept)[: sources.config.gallery.errors]
    reasons = []
    for (stage, reason), count in counts.most_common():
        kept = sorted(examples[stage, reason])[: sources.config.gallery.errors]
        reasons.append(
            {
                "stage": stage,
                "reason": reason,
                "count": count,
                "share": count / counts.total(),
                "examples": [(image_id, redact(uri), redact(error)) for image_id, uri, error in kept],
                "more": count - len(kept),
            }
        )
    return Failures(counts.total(), reasons)
