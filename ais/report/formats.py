"""Numbers for people: as many digits as say something, and never 0% or 100% for what is neither."""

from __future__ import annotations

import math

_MOST_DECIMALS = 8


def whole(value: int) -> str:
    """Return 1234567 as ``1,234,567``."""
    return f"{value:,}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 image`` or ``12 images``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def percent(share: float) -> str:
    """A share in [0, 1] with one digit after the point, more where that would read 0% or 100%."""
    if not math.isfinite(share):
        return "–"
    if share in (0, 1):
        return f"{share:.0%}"
    rest = min(share, 1 - share)
    digits = 1 if rest >= 0.0005 else min(6, 1 - math.floor(math.log10(rest)) - 2)
    text = f"{100 * share:.{digits}f}"
    if rest < 1e-8:
        return "under 0.000001%" if share < 0.5 else "over 99.999999%"
    return text + "%"


def decimals_for(spread: float) -> int:
    """Digits after the point that tell apart numbers that differ by a hundredth of ``spread``."""
    if not math.isfinite(spread) or spread <= 0:
        return 2
    return max(0, min(_MOST_DECIMALS, 2 - math.floor(math.log10(spread))))


def fixed(value: float, decimals: int) -> str:
    """A number with so many digits after the point; a true minus sign; a dash where it is not finite."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e7 or (decimals >= _MOST_DECIMALS and 0 < abs(value) < 1e-4):
        return _signed(f"{value:.2e}")
    return _signed(f"{value:,.{decimals}f}")


def short(value: float) -> str:
    """Three significant digits; a dash where it is not finite."""
    if not math.isfinite(value):
        return "–"
    if value and not 1e-4 <= abs(value) < 1e7:
        return _signed(f"{value:.2e}")
    digits = 2 - (math.floor(math.log10(abs(value))) if value else 0)
    return _signed(f"{value:,.{max(0, digits)}f}")


def size(count: float) -> str:
    """Bytes as kB or MB of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def _signed(text: str) -> str:
    if not any(digit in text.split("e")[0] for digit in "123456789"):
        text = text.removeprefix("-")
    return text.replace("-", "−")
