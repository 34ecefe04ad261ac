"""Markdown of the figures, as the README shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def paragraph(text: str) -> str:
    """Text of a few lines, however it was written."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def grid(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def show(ratio: dict[str, float]) -> str:
    """Write a ratio: median (smallest–largest)."""
    return "{} ({}–{})".format(*(_short(ratio[name]) for name in ("median", "low", "high")))


def _short(value: float) -> str:
    """Three digits, and no exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
