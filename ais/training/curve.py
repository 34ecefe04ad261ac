"""The training curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ais.training.fit import FittedHead

_TRAINING, _VALIDATION, _INK = "#9a9a9a", "#1f5fa8", "#333333"


def training_curve(heads: Sequence[FittedHead]) -> bytes:
    """Draw training and validation RMSE (rating units) over epochs, with a dot at each head's best epoch.

    Returns:
        a PNG of 1280 × 800 pixels.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    alpha = 1.0 if len(heads) == 1 else max(0.25, 1.5 / len(heads))
    for head in heads:
        epochs = range(1, len(head.validation_rmse) + 1)
        axes.plot(epochs, head.train_rmse, color=_TRAINING, linewidth=1, alpha=alpha)
        axes.plot(epochs, head.validation_rmse, color=_VALIDATION, linewidth=1.3, alpha=alpha)
        best = head.validation_rmse[head.best_epoch - 1]
        axes.plot(head.best_epoch, best, "o", color=_VALIDATION, markersize=5, markeredgecolor="white")
    axes.plot([], [], color=_TRAINING, linewidth=1, label="training")
    axes.plot([], [], color=_VALIDATION, linewidth=1.3, label="validation")
    axes.plot([], [], "o", color=_VALIDATION, markersize=5, markeredgecolor="white", label="best epoch, kept")
    axes.set_xlabel("epoch", color=_INK)
    axes.set_ylabel("RMSE in rating units", color=_INK)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_TRAINING)
    axes.tick_params(colors=_INK, length=3)
    axes.legend(frameon=False, labelcolor=_INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
