"""A metric of every two runs as a picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ais.comparison.pairs import MeanAgreement

_INK, _QUIET, _EMPTY = "#333333", "#8a8a8a", "#f2f2f2"
# Signed metrics share one scale, blue over white (zero) to red. An error is dark where it is large.
_SIGNED = {"pearson", "cosine", "ssim"}
_PALE = 3  # times the range of the values: only the pale third of the colours, on which numbers can be read
_CELL_INCHES, _NAME_LENGTH = 1.15, 18


def matrix_png(
    metric: str, meaning: str, names: Sequence[str], cells: Mapping[tuple[str, str], MeanAgreement]
) -> bytes:
    """Draw one metric as a symmetric matrix; each cell says the mean and below it its 95% interval.

    Args:
        metric: key of `ais.agreement.METRICS`.
        meaning: what its values mean, under the title.
        names: of the runs, in order.
        cells: the mean agreement of each pair of names, in one order.

    Returns:
        a PNG.
    """
    count = len(names)
    place = {name: index for index, name in enumerate(names)}
    means = np.full((count, count), np.nan)
    for (one, other), cell in cells.items():
        means[place[one], place[other]] = means[place[other], place[one]] = cell.mean
    figure = Figure(figsize=(max(4.8, _CELL_INCHES * count + 2.4), _CELL_INCHES * count + 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(_EMPTY)
    if metric in _SIGNED:
        axes.imshow(means, cmap="RdBu_r", vmin=-_PALE, vmax=_PALE)
    else:
        highest = 1.0 if metric == "top_overlap" else np.nanmax(means, initial=0) or 1.0
        axes.imshow(means, cmap="Blues", vmin=0, vmax=_PALE * highest)
    for (one, other), cell in cells.items():
        for row, column in ((place[one], place[other]), (place[other], place[one])):
            axes.text(column, row - 0.06, format_value(cell.mean), ha="center", va="center", color=_INK, fontsize=12)
            interval = "" if np.isnan(cell.low) else f"{format_value(cell.low)} to {format_value(cell.high)}"
            axes.text(column, row + 0.18, interval, ha="center", va="center", color=_INK, fontsize=7)
    wrapped = [textwrap.fill(name, _NAME_LENGTH) for name in names]
    axes.set_xticks(range(count), wrapped)
    axes.set_yticks(range(count), wrapped)
    axes.xaxis.tick_top()
    axes.tick_params(colors=_INK, length=0, labelsize=8)
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(metric, color=_INK, fontsize=12)
    figure.supxlabel(textwrap.fill(meaning, 52), color=_QUIET, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def format_value(value: float) -> str:
    """Three digits for people to read; a dash for NaN."""
    if np.isnan(value):
        return "–"
    return f"{value:.3f}" if 0.1 <= abs(value) < 10 else f"{value:.3g}"
