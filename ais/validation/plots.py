"""The curves of a validation as pictures."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ais.validation.faithfulness import Curves
from ais.validation.protocol import CumulativeCurve

_INK = "#333333"
_METHODS = {
    "ais": ("#1f5fa8", "heatmap", 2.2, "-"),
    "Grad-CAM": ("#d0792b", "Grad-CAM", 1.3, "-"),
    "random head": ("#e8a0bf", "random head", 1.6, "--"),  # often on top of the heatmap's own curve
    "centre": ("#3d8f5f", "centre", 1.3, "-"),
    "random": ("#9a9a9a", "random", 1.3, "-"),
}
_ORDERS = {
    "ais": ("#1f5fa8", "by AIS", 2.2),
    "random": ("#9a9a9a", "random order", 1.3),
    "reversed": ("#d0792b", "reversed", 1.3),
}


def deletion_png(found: dict[str, dict[str, Curves]]) -> bytes:
    """Draw the mean score along deletion and insertion, a row for each fill; PNG bytes."""
    figure = Figure(figsize=(8, 3.2 * len(found)), dpi=150, layout="constrained")
    grid = figure.subplots(len(found), 2, sharex=True, sharey="row", squeeze=False)
    for row, fill in zip(grid, found, strict=True):
        for axes, mode in zip(row, ("deletion", "insertion"), strict=True):
            for method, (colour, label, width, style) in _METHODS.items():
                curve = getattr(found[fill][method], mode).mean(0)
                shares = np.linspace(0, 1, len(curve))
                axes.plot(shares, curve, color=colour, linewidth=width, linestyle=style, label=label)
            axes.set_title(f"{mode}, {fill} fill", color=_INK, fontsize=10)
            _plain(axes)
        row[0].set_ylabel("mean score")
    for axes, action in zip(grid[-1], ("deleted", "inserted"), strict=True):
        axes.set_xlabel(f"share of the image {action}")
    grid[0][0].legend(frameon=False, fontsize=8)
    return _png(figure)


def cumulative_png(protocol: dict[str, CumulativeCurve]) -> bytes:
    """Draw the test value over the number of maps added, a panel for each measure; PNG bytes."""
    figure = Figure(figsize=(4 * len(protocol), 3.6), dpi=150, layout="constrained")
    grid = figure.subplots(1, len(protocol), squeeze=False)[0]
    for axes, (measure, curve) in zip(grid, protocol.items(), strict=True):
        for order, (colour, label, width) in _ORDERS.items():
            axes.plot(curve.counts[1:], curve.orders[order].curve[1:], color=colour, linewidth=width, label=label)
        axes.axhline(curve.all_test.mean(), color=_INK, linewidth=0.8, linestyle="--", label="all maps")
        axes.set_xlabel("maps added")
        axes.set_ylabel(f"{measure} on test images, mean over the fits")
        _plain(axes)
    grid[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, length=3)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()
