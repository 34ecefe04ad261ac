"""An AIS vector as a table and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ais.importance.effects import QUANTITIES, EffectSums
from ais.importance.jackknife import JackknifedAIS

_BLUE, _GREY = "#1f5fa8", "#8c8c8c"


def rank_of(ais: np.ndarray) -> np.ndarray:
    """Rank ``(C,)`` int64 of each map, 1 for the largest AIS; ties in the order of the maps."""
    ranks = np.empty(len(ais), np.int64)
    ranks[np.argsort(-ais, kind="stable")] = np.arange(1, len(ais) + 1)
    return ranks


def effects_table(sums: EffectSums, objective: str) -> pa.Table:
    """Table of the objectives ``prediction`` and ``error``: map, ais, rank, means, and 95% intervals over images."""
    chosen = "effect" if objective == "prediction" else "error_effect"
    low, high = sums.interval(chosen)
    columns: dict[str, np.ndarray] = {
        "map": np.arange(sums.sums.shape[1]),
        "ais": sums.mean(chosen),
        "rank": rank_of(sums.mean(chosen)),
        "ais_low": low,
        "ais_high": high,
    }
    quantities = QUANTITIES if objective == "error" else QUANTITIES[:1]
    return pa.table(columns | {f"mean_{quantity}": sums.mean(quantity) for quantity in quantities})


def similarity_table(found: JackknifedAIS) -> pa.Table:
    """Table of the objective ``similarity``: map, ais (of the set), rank, and 95% jackknife intervals over images."""
    low, high = found.interval()
    columns = {"map": np.arange(len(found.mean)), "ais": found.mean, "rank": rank_of(found.mean)}
    return pa.table(
        columns | {"ais_low": pa.array(low, from_pandas=True), "ais_high": pa.array(high, from_pandas=True)}
    )


def by_image_table(uris: Sequence[str], ais: np.ndarray) -> pa.Table:
    """Table of individual AIS: ``uri``, and ``ais`` as a list of C float64, map 0 first; a row an image."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(ais).ravel()), ais.shape[1])
    return pa.table({"uri": pa.array(uris, pa.string()), "ais": values})


def ranking_png(table: pa.Table, what: str) -> bytes:
    """Draw the AIS of all maps, largest first, with its interval where there is one; PNG bytes."""
    order = np.argsort(table["rank"].to_numpy())
    ais = table["ais"].to_numpy()[order]
    ranks = np.arange(1, len(ais) + 1)
    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    if "ais_low" in table.column_names:
        low, high = (table[name].to_numpy()[order] for name in ("ais_low", "ais_high"))
        axes.fill_between(ranks, low, high, color=_BLUE, alpha=0.2, linewidth=0, label="95% interval over images")
        axes.legend(frameon=False)
    axes.plot(ranks, ais, color=_BLUE, linewidth=1.5)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    # A few maps carry most of it: on a linear axis the ranking of thousands is an L.
    axes.set_xscale("log")
    axes.set_xlim(1, len(ais))
    axes.set_xlabel("feature map, by rank (logarithmic)")
    axes.set_ylabel(what)
    axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()
