"""Charts as inline SVG: a few kinds, one quiet style, colours from the style sheet's variables.

Every chart is an ``<svg role="img">`` with a title that says what it shows; the words that say how to read it stand
beside it on the page. Text goes through `markupsafe`, so no label can be markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from ais.report.formats import short

_HEIGHT = 254
_WIDTH = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 46
_LETTER = 6.8  # mean width of a character at the size of labels
_SEGMENTS = 1200  # of a line; more cannot be seen


@dataclass(frozen=True)
class Scale:
    """From values to places along one side.

    Args:
        low: value at ``start``.
        high: value at ``end``.
        start: place in pixels.
        end: place in pixels.
        logarithmic: whether equal ratios are equal distances; ``low`` is then above 0.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, values: ArrayLike) -> NDArray[np.float64]:
        """Places of values."""
        ends, found = np.array([self.low, self.high], np.float64), np.asarray(values, np.float64)
        if self.logarithmic:
            ends, found = np.log(ends), np.log(np.maximum(found, self.low))
        span = ends[1] - ends[0] or 1.0
        return self.start + (found - ends[0]) / span * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values between the ends."""
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [float(10**power) for power in powers]
        step = nice_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least ``rough``."""
    if not math.isfinite(rough) or rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def nice_range(values: ArrayLike, *, zero: bool = False, count: int = 5) -> tuple[float, float]:
    """Ends at round values around all finite values (and zero); never of no length."""
    found = np.asarray(values, np.float64).ravel()
    found = found[np.isfinite(found)]
    if zero or not found.size:
        found = np.append(found, 0.0)
    low, high = float(found.min()), float(found.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    step = nice_step((high - low) / count)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def bins(low: float, high: float, count: int = 36) -> NDArray[np.float64]:
    """Edges of about ``count`` bins of a round width around ``low`` to ``high``."""
    low, high = nice_range([low, high], count=count)
    step = nice_step((high - low) / count)
    return np.arange(round(low / step), round(high / step) + 1, dtype=np.float64) * step


def histogram(
    edges: NDArray[np.float64], counts: NDArray[np.int64], title: str, label: str, marks: Sequence[tuple[float, str]]
) -> Markup:
    """Bars of counts; twice, for wide screens and for narrow ones, of which the style sheet shows one.

    Args:
        edges: ``(bins + 1,)``.
        counts: ``(bins,)``.
        title: what the chart shows.
        label: of the x axis.
        marks: values with a word, drawn as lines over the bars.
    """
    return Markup().join(_histogram(edges, counts, title, label, marks, wide) for wide in (True, False))


def _histogram(
    edges: NDArray[np.float64],
    counts: NDArray[np.int64],
    title: str,
    label: str,
    marks: Sequence[tuple[float, str]],
    wide: bool,
) -> Markup:
    frame = _Frame((float(edges[0]), float(edges[-1])), (0, max(1, int(counts.max(initial=1)))), wide=wide, top=26)
    lefts, tops = frame.x(edges), frame.y(counts)
    bars = [
        Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"/>').format(
            _n(left + 0.5), _n(top), _n(max(0.5, right - left - 1)), _n(frame.y.start - top)
        )
        for left, right, top, count in zip(lefts[:-1], lefts[1:], tops, counts, strict=True)
        if count
    ]
    lines, last = [], -math.inf
    for value, word in marks:
        x = float(frame.x(value))
        lines.append(
            Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                _n(x), frame.top - 4, frame.y.start
            )
        )
        if x - last > _LETTER * len(word) + 10:
            lines.append(Markup('<text class="label mid" x="{}" y="{}">{}</text>').format(_n(x), frame.top - 9, word))
            last = x
    kind = "on-wide" if wide else "on-narrow"
    return frame.draw(title, label, "images", [*bars, *lines], whole_y=True, kind=kind)


@dataclass(frozen=True)
class Line:
    """One line of `lines`.

    Args:
        x: ``(n,)``.
        y: ``(n,)``.
        name: in the legend; lines of one name share an entry.
        style: class of the style sheet: ``main``, ``other``, ``third``, ``quiet`` or ``quiet dashed``.
        dot: index of a point that is marked.
        low: ``(n,)`` lower end of a band around it.
        high: ``(n,)`` upper end.
    """

    x: NDArray
    y: NDArray
    name: str
    style: str = "main"
    dot: int | None = None
    low: NDArray | None = None
    high: NDArray | None = None


def lines(
    drawn: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    *,
    zero: bool = False,
    logarithmic: bool = False,
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """Lines over a common pair of axes, with a legend below where they have different names."""
    bands = [band for line in drawn for band in (line.low, line.high) if band is not None]
    y_values = np.concatenate([*(np.asarray(line.y, np.float64) for line in drawn), *bands])
    xs = np.concatenate([line.x for line in drawn])
    x_ends = x_range or (float(xs.min()), float(xs.max()) if np.ptp(xs) else float(xs.min()) + 1)
    frame = _Frame(x_ends, nice_range(y_values, zero=zero), logarithmic=logarithmic)
    parts: list[Markup] = []
    if frame.y.low < 0 < frame.y.high:
        parts.append(frame.horizontal(0, "zero"))
    for line in drawn:
        kept = _thinned(len(line.x), logarithmic)
        x = frame.x(line.x[kept])
        if line.low is not None and line.high is not None:
            edge = [*zip(x, frame.y(line.high[kept]), strict=True)]
            edge += [*zip(x[::-1], frame.y(line.low[kept])[::-1], strict=True)]
            parts.append(Markup('<path class="band {}" d="{}Z"/>').format(line.style, _path(edge)))
        path = _path([*zip(x, frame.y(line.y[kept]), strict=True)])
        parts.append(Markup('<path class="line {}" d="{}"/>').format(line.style, path))
    parts += [
        Markup('<circle class="dot {}" cx="{}" cy="{}" r="4"/>').format(
            line.style, _n(frame.x(line.x[line.dot])), _n(frame.y(line.y[line.dot]))
        )
        for line in drawn
        if line.dot is not None
    ]
    return frame.draw(title, x_label, y_label, parts) + legend([(line.name, line.style) for line in drawn])


def scatter(x: NDArray, y: NDArray, title: str, x_label: str, y_label: str) -> Markup:
    """Points on equal axes with the line where both are equal; beyond 1,500 points, squares that darken with number."""
    ends = nice_range(np.concatenate([x, y]))
    frame = _Frame(ends, ends, square=True)
    (left, right), (bottom, top) = frame.x([ends[0], ends[1]]), frame.y([ends[0], ends[1]])
    parts = [
        Markup('<line class="equal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(_n(left), _n(bottom), _n(right), _n(top))
    ]
    if len(x) <= 1500:
        xs, ys = frame.x(x), frame.y(y)
        parts += [
            Markup('<circle class="point" cx="{}" cy="{}" r="2.6"/>').format(_n(a), _n(b))
            for a, b in zip(xs, ys, strict=True)
        ]
    else:
        cells = 44
        counts = np.histogram2d(x, y, cells, [ends, ends])[0]
        side = (right - left) / cells
        shades = np.sqrt(counts / counts.max())
        parts += [
            Markup('<rect class="cell" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"/>').format(
                _n(left + i * side), _n(bottom - (j + 1) * side), _n(side), _n(side), _n(0.1 + 0.9 * shades[i, j])
            )
            for i, j in np.argwhere(counts > 0)
        ]
    return frame.draw(title, x_label, y_label, parts)


@dataclass(frozen=True)
class Interval:
    """A figure with its interval, as `intervals` draws it.

    Args:
        value: the figure.
        low: lower end; NaN where there is none.
        high: upper end.
        name: the row's label.
        style: class of the style sheet.
    """

    value: float
    low: float
    high: float
    name: str
    style: str = "main"


def intervals(rows: Sequence[Interval], title: str, label: str) -> Markup:
    """A row for each figure: a dot, its interval, and the line of zero."""
    ends = nice_range([v for row in rows for v in (row.value, row.low, row.high)], zero=True)
    longest = max((len(row.name) for row in rows), default=0)
    left = min(200, max(70, _LETTER * longest + 14))
    frame = _Frame(ends, (0, 1), left=left, height=_TOP + _BOTTOM + 22 * len(rows), bottom=_BOTTOM)
    parts = [frame.vertical(0, "zero")]
    for index, row in enumerate(rows):
        y = frame.top + 11 + 22 * index
        name = _clipped(row.name, left - 12)
        parts.append(Markup('<text class="label end" x="{}" y="{}">{}</text>').format(_n(left - 8), y + 4, name))
        if not math.isfinite(row.value):
            parts.append(Markup('<text class="label" x="{}" y="{}">undefined</text>').format(_n(left + 6), y + 4))
            continue
        if math.isfinite(row.low) and math.isfinite(row.high):
            x1, x2 = frame.x([row.low, row.high])
            parts.append(
                Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(
                    row.style, _n(x1), _n(x2), y=y
                )
            )
        parts.append(
            Markup('<circle class="dot {}" cx="{}" cy="{}" r="4"/>').format(row.style, _n(frame.x(row.value)), y)
        )
    return frame.draw(title, label, "", parts, y_axis=False)


def matrix(
    names: Sequence[str],
    values: NDArray[np.float64],
    notes: Callable[[int, int], str],
    title: str,
    *,
    signed: bool,
    highest: float,
) -> Markup:
    """Return a square of values, shaded pale so that they can be read on it.

    Args:
        names: of rows and columns.
        values: ``(n, n)``; NaN is left empty.
        notes: small text under the value of a row and column.
        title: what the chart shows.
        signed: shade below zero in another hue than above.
        highest: absolute value of the deepest shade.
    """
    count = len(names)
    cell = max(58.0, min(110.0, 330.0 / count))
    left, top = 108.0, 34.0
    width, height = left + cell * count + 8, top + cell * count + 8
    parts = []
    for index, name in enumerate(names):
        middle = top + cell * (index + 0.5)
        parts.append(
            Markup('<text class="label end" x="{}" y="{}">{}</text>').format(
                _n(left - 8), _n(middle + 4), _clipped(name, left - 10)
            )
        )
        parts.append(
            Markup('<text class="label mid" x="{}" y="{}">{}</text>').format(
                _n(left + cell * (index + 0.5)), _n(top - 10), _clipped(name, cell)
            )
        )
    for row in range(count):
        for column in range(count):
            x, y, value = left + cell * column, top + cell * row, float(values[row, column])
            style, opacity = "empty", 1.0
            if math.isfinite(value):
                style = "negative" if signed and value < 0 else "positive"
                opacity = 0.06 + 0.34 * min(1.0, abs(value) / (highest or 1.0))
            parts.append(
                Markup('<rect class="tile {}" x="{}" y="{}" width="{w}" height="{w}" fill-opacity="{}"/>').format(
                    style, _n(x + 1), _n(y + 1), _n(opacity), w=_n(cell - 2)
                )
            )
            if math.isfinite(value):
                middle = x + cell / 2
                parts.append(
                    Markup('<text class="value mid" x="{}" y="{}">{}</text>').format(
                        _n(middle), _n(y + cell / 2 + 1), short(value)
                    )
                )
                parts.append(
                    Markup('<text class="note mid" x="{}" y="{}">{}</text>').format(
                        _n(middle), _n(y + cell / 2 + 15), notes(row, column)
                    )
                )
    return _svg(width, height, title, parts, "chart matrix")


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Names with the stroke of their style; nothing where there are fewer than two."""
    distinct = dict.fromkeys(entry for entry in entries if entry[0])
    if len(distinct) < 2:
        return Markup()
    items = [
        Markup(
            '<li><svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="line {}" d="M1 4H21"/></svg>'
            "{}</li>"
        ).format(style, name)
        for name, style in distinct
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup().join(items))


class _Frame:
    """The axes of a chart and what is drawn between them."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        wide: bool = False,
        square: bool = False,
        logarithmic: bool = False,
        left: float = _LEFT,
        top: float = _TOP,
        bottom: float = _BOTTOM,
        height: float | None = None,
    ) -> None:
        self.width = 2 * _WIDTH if wide else 340 if square else _WIDTH
        self.height = height or (340 - _RIGHT - left + top + bottom if square else _HEIGHT)
        self.left, self.top = left, top
        self.x = Scale(*x, left, self.width - _RIGHT, logarithmic)
        self.y = Scale(*y, self.height - bottom, top)

    def horizontal(self, value: float, style: str) -> Markup:
        return Markup('<line class="{}" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(
            style, _n(self.x.start), _n(self.x.end), y=_n(self.y(value))
        )

    def vertical(self, value: float, style: str) -> Markup:
        return Markup('<line class="{}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(
            style, _n(self.y.start), _n(self.y.end), x=_n(self.x(value))
        )

    def draw(
        self,
        title: str,
        x_label: str,
        y_label: str,
        parts: Sequence[Markup],
        *,
        whole_y: bool = False,
        y_axis: bool = True,
        kind: str = "",
    ) -> Markup:
        """Put axes under the parts and name them."""
        drawn: list[Markup] = []
        floor = self.y.start
        if y_axis:
            ticks = [tick for tick in self.y.ticks(4) if not whole_y or tick == round(tick)]
            for tick in ticks:
                drawn.append(self.horizontal(tick, "grid"))
                drawn.append(
                    Markup('<text class="label end" x="{}" y="{}">{}</text>').format(
                        _n(self.left - 7), _n(self.y(tick) + 4), _tick(tick, ticks)
                    )
                )
        ticks = self.x.ticks(10 if self.width > _WIDTH else 5)
        for tick in ticks:
            x = float(self.x(tick))
            drawn.append(
                Markup('<text class="label mid" x="{}" y="{}">{}</text>').format(
                    _n(x), _n(floor + 17), _tick(tick, ticks, self.x.logarithmic)
                )
            )
        drawn.append(
            Markup('<line class="axis" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(
                _n(self.left), _n(self.x.end), y=_n(floor)
            )
        )
        drawn += parts
        middle = (self.left + self.x.end) / 2
        drawn.append(
            Markup('<text class="label name mid" x="{}" y="{}">{}</text>').format(_n(middle), _n(floor + 37), x_label)
        )
        if y_label:
            middle = (self.top + floor) / 2
            drawn.append(
                Markup('<text class="label name mid" transform="translate(12 {}) rotate(-90)">{}</text>').format(
                    _n(middle), y_label
                )
            )
        shape = "wide" if self.width > _WIDTH else "square" if self.width < _WIDTH else ""
        return _svg(self.width, self.height, title, drawn, " ".join(filter(None, ("chart", shape, kind))))


def _svg(width: float, height: float, title: str, parts: Sequence[Markup], kind: str) -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}</svg>').format(
        kind, _n(width), _n(height), title, title, Markup().join(parts)
    )


def _tick(value: float, ticks: Sequence[float], logarithmic: bool = False) -> str:
    """A label with as many digits as tell it from its neighbours."""
    if logarithmic:
        return f"{value:,.0f}"
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    largest = max(map(abs, ticks), default=0)
    if largest >= 1e6 or (largest and largest < 1e-3):
        text = f"{value:.3g}" if abs(value) > step / 2 else "0"
        return text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-").replace("-", "−")
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:,.{digits}f}"
    return (text.removeprefix("-") if float(text.replace(",", "")) == 0 else text).replace("-", "−")


def _thinned(count: int, logarithmic: bool) -> NDArray[np.int64]:
    """Indices of the points of a line that can be told apart."""
    if count <= _SEGMENTS:
        return np.arange(count)
    if logarithmic:
        return np.unique(np.rint(np.geomspace(1, count, _SEGMENTS)).astype(np.int64)) - 1
    return np.unique(np.rint(np.linspace(0, count - 1, _SEGMENTS)).astype(np.int64))


def _path(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path through the finite points, with gaps at the others."""
    commands, pen = [], "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            commands.append(f"{pen}{_n(x)} {_n(y)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(commands)


def _clipped(text: str, width: float) -> str:
    """Text of at most ``width`` pixels, its middle left out where it is longer."""
    most = max(3, int(width / _LETTER))
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def _n(value: ArrayLike) -> str:
    """A coordinate with one digit after the point where it needs one."""
    return f"{float(np.asarray(value)):.2f}".rstrip("0").rstrip(".")
