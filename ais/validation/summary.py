"""The validations of several backbones side by side: a row a figure, and per backbone what was and was not shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARKS = {"shown": "✓", "not shown": "–", "against": "✗", "not measured": "?"}
# Name of a check, and what its row says.
_CHECKS = {
    "head predicts": "head predicts ratings of test images: PLCC",
    "RMSE along random": "maps added by AIS lead a random order, test RMSE",
    "PLCC along random": "… test PLCC",
    "ais separates": "maps with a higher AIS respond more to the disc: Spearman",
    "ais separates random head": "… lead over unfitted heads",
    "deletion blurred random": "deletion by the heatmap leads random maps, score",
    "deletion blurred centre": "… leads the centre-bias map",
    "deletion blurred random head": "… leads heatmaps of unfitted heads",
    "pointing random head": "pointing at the disc leads heatmaps of unfitted heads",
    "overlap random head": "… overlap with the disc (IoU)",
    "variants random head": "variants of the head agree more than unfitted heads",
}
_SIMILARITY_CHECKS = {
    "model agrees": "model's similarity agrees with the judgments: R",
    "R² along random": "maps added by AIS lead a random order, test R²",
}
_METRICS = ("pearson", "top_overlap", "emd")


@dataclass(frozen=True)
class _Row:
    """A figure: what it is, and a cell for each column."""

    what: str
    cells: list[str]


def summarise(folder: Path, backbones: Sequence[str]) -> str:
    """Return the table and the verdicts, and write them to ``summary.md`` in the folder.

    Args:
        folder: with ``BACKBONE/validation-true``, ``validation-shuffled`` and ``validation-similarity`` for each of the
            backbones, and ``comparison``.
        backbones: their names.
    """
    heads = [
        (f"{backbone}, {ratings}", _document(folder / backbone / f"validation-{ratings}" / "validation.json"))
        for backbone in backbones
        for ratings in ("true", "shuffled")
    ]
    maps = [
        (backbone, _document(folder / backbone / "validation-similarity" / "validation.json")) for backbone in backbones
    ]
    rows = [_Row(what, [_check(document, name) for _, document in heads]) for name, what in _CHECKS.items()]
    rows += _heatmap_rows([document for _, document in heads])
    similar = [
        _Row(what, [_check(document, name) for _, document in maps]) for name, what in _SIMILARITY_CHECKS.items()
    ]
    agreement = _agreement(_document(folder / "comparison" / "summary.json"))
    parts = [
        _table("head fitted to ratings", [name for name, _ in heads], rows),
        _table("similarity judgments", [name for name, _ in maps], similar),
        _table("heatmaps of two backbones", list(_METRICS), agreement),
        "✓ shown, – not shown, ✗ the opposite shown: the 95% interval lies above zero, holds it, lies below it; ? not "
        "measured.",
        "\n".join(f"{name}: {document['conclusion']}" for name, document in heads),
        "\n".join(f"{name}, similarity: {document['conclusion']}" for name, document in maps),
    ]
    text = "\n\n".join(parts)
    (folder / "summary.md").write_text(text + "\n")
    return text


def _heatmap_rows(documents: list[dict[str, Any]]) -> list[_Row]:
    """Figures without a claim."""
    figures = [document["heatmaps"] for document in documents]

    def correlation(key: str, weighting: str) -> list[str]:
        return [_number(each[key][weighting]["value"]) for each in figures]

    return [
        _Row(
            "heatmaps with their maximum on the disc (by chance)",
            [
                f"{_number(ours['hit_rate']['value'])} ({_number(ours['chance'])})"
                for ours in (each["pointing"]["ais"] for each in figures)
            ],
        ),
        _Row(
            "the same of unfitted heads",
            [_number(each["pointing"]["random head"]["hit_rate"]["value"]) for each in figures],
        ),
        _Row("rank correlation with unfitted heads, signed", correlation("random_head_correlation", "signed")),
        _Row("rank correlation with unfitted heads, positive", correlation("random_head_correlation", "positive")),
        _Row("rank correlation between variants, signed", correlation("variant_correlation", "signed")),
    ]


def _agreement(document: dict[str, Any]) -> list[_Row]:
    return [
        _Row(
            f"{pair['run_a']} – {pair['run_b']} ({pair['images']} images)",
            [_number(pair["agreement"][metric]["mean"]) for metric in _METRICS],
        )
        for pair in document["pairs"]
    ]


def _document(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _check(document: dict[str, Any], name: str) -> str:
    check = next(check for check in document["checks"] if check["name"] == name)
    return f"{_number(check['value'])} {_MARKS[check['outcome']]}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if 0.95 <= abs(value) < 1:  # how near to one is what matters
        return f"{value:.3f}"
    return f"{value:.2f}" if abs(value) >= 0.095 or value == 0 else f"{value:.2g}"


def _table(corner: str, columns: list[str], rows: list[_Row]) -> str:
    """Markdown that reads as plain text too."""
    cells = [[corner, *columns], *([row.what, *row.cells] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
