"""The pages: which images, how many to a page, and what is written where.

index.html                    what the run came to, and how far to trust it
images.html, images-2.html …  the gallery, highest score first
model.html                    the head, and the importance of its feature maps
trust.html                    validation, agreement between models, everything to keep in mind
errors.html                   images that could not be used, by reason; only where there are some
made.html                     what the run was made of
assets/                       style sheet and script
images/<image_id>-….webp      thumbnail, heatmap and overlay of each image shown
report.json                   what the report holds; written last
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from ais.images import Limits
from ais.placement import Weighting
from ais.progress import ProgressLine
from ais.render import colorize
from ais.report import sections
from ais.report.failures import Failures, read_failures
from ais.report.formats import percent, whole
from ais.report.meaning import meaning_of
from ais.report.pictures import Picture, PictureMaker, as_rows
from ais.report.scores import Scores, read_scores
from ais.report.selection import Shown, choose
from ais.report.sources import Sources, column
from ais.report.versions import Versions
from ais.report.writer import Report, Writer
from ais.secrets import redact
from ais.storage import scratch_folder

_ROW_COLUMNS = ("image_id", "uri", "etag", "width", "height", "box", "heatmap_box", "heatmap", "score", "score_std")
_ROWS_AT_ONCE = 64  # of which pictures are in memory
_FRAME_BYTES = 24_000  # of a page of images besides the images
_STRIP = 6
_RANGE_STRIP = 6


@dataclass(frozen=True)
class Card:
    """An image of the gallery, drawn.

    Args:
        html: of the card.
        bytes: of the card and its pictures.
        facts: for the script: id, score, spread and address.
        picture: without its bytes.
    """

    html: Markup
    bytes: int
    facts: dict[str, Any]
    picture: dict[str, Any]


def write_report(sources: Sources) -> Report:
    """Read the results, choose, draw, write; `report.json` last.

    Raises:
        RunError: a shard of the run cannot be read.
        StorageError: a page cannot be written.
    """
    with scratch_folder("ais-report-") as scratch, Writer(sources) as writer:
        scores = read_scores(sources.run.results.files("*.parquet"), scratch)
        overview = sections.overview_of(scores)
        shown = choose(scores, sources.config.gallery)
        cards = []
        if overview:
            with ProgressLine("pictures", len(shown.positions), silent_s=1) as progress:
                for card in _cards(scores, shown, overview, sources, writer):
                    cards.append(card)
                    progress.advance()
        failures = read_failures(sources)
        return _write_pages(sources, scores, overview, shown, cards, failures, writer)


def _cards(
    scores: Scores, shown: Shown, overview: sections.Overview, sources: Sources, writer: Writer
) -> Iterator[Card]:
    """Draw the images of the gallery and write their pictures; only a few are in memory at a time."""
    weighting: Weighting = "signed" if sources.weighting == "signed" else "positive"
    limits = Limits(**sources.config.limits.model_dump())
    side = sources.config.gallery.max_side
    below, above = scores.below_and_above(scores.scores[np.asarray(shown.positions, np.int64)])
    blue, versions = meaning_of(sources).blue, Versions(sources.run.manifest)
    with PictureMaker(weighting, side, limits, sources.storage, sources.output, blue) as draw:
        for start in range(0, len(shown.positions), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            table = scores.rows(shown.positions[part], _ROW_COLUMNS)
            rows = as_rows(table, above[part] + 1, below[part] / scores.count, versions(table))
            for position, picture in zip(shown.positions[part], draw(rows), strict=True):
                yield _card(position, picture, shown, overview, scores.count, writer)


def _card(
    position: int,
    picture: Picture,
    shown: Shown,
    overview: sections.Overview,
    count: int,
    writer: Writer,
) -> Card:
    row = picture.row
    uri = redact(row.uri)
    names = {}
    for kind, data in (("image", picture.thumbnail), ("heatmap", picture.heatmap), ("overlay", picture.overlay)):
        names[kind] = None if data is None else f"images/{row.image_id}-{kind}.webp"
        if data is not None:
            writer.write(f"images/{row.image_id}-{kind}.webp", data)
    left, top, right, bottom = (float(value) for value in row.box)
    seen = max(0.0, left), max(0.0, top), min(float(row.width), right), min(float(row.height), bottom)
    facts = {
        "id": row.image_id,
        "name": uri.rstrip("/").rpartition("/")[2] or uri,
        "uri": uri,
        "score": overview.score(row.score),
        "spread": None if row.spread is None else overview.score(row.spread),
        "rank": whole(row.rank),
        "of": whole(count),
        "below": percent(row.below),
        "below_share": row.below,
        "size": picture.size,
        "original": (row.width, row.height),
        "cell": picture.cell,
        "cell_text": f"{picture.cell[2]:.0f} × {picture.cell[3]:.0f}",
        "seen": seen,
        "strongest": picture.strongest,
        "link": picture.link,
        "missing": picture.missing,
        "changed": picture.changed,
        "looked_at": picture.looked_at,
        "names": names,
        "choices": [name for name, positions in shown.choices.items() if position in positions],
    }
    html = Markup(writer.templates.get_template("card.html").render(image=facts))
    script = {
        "id": row.image_id,
        "score": float(row.score),
        "spread": row.spread,
        "uri": uri,
        "choices": facts["choices"],
    }
    return Card(html, len(html.encode()) + len(json.dumps(script)) + picture.bytes, script, facts)


def pages_of(cards: Sequence[Card], page_bytes: int, frame_bytes: int) -> list[list[Card]]:
    """Deal the cards into pages that open within a budget; a page holds at least one card."""
    pages: list[list[Card]] = []
    room = 0
    for card in cards:
        if not pages or card.bytes > room:
            pages.append([])
            room = page_bytes - frame_bytes
        pages[-1].append(card)
        room -= card.bytes
    return pages


def _write_pages(
    sources: Sources,
    scores: Scores,
    overview: sections.Overview | None,
    shown: Shown,
    cards: Sequence[Card],
    failures: Failures,
    writer: Writer,
) -> Report:
    looked_at = float(np.mean([card.picture["looked_at"] for card in cards])) if cards else None
    changed = sum(card.picture["changed"] for card in cards)
    cautions = sections.cautions(sources, overview, failures.count, looked_at, _outside(scores, sources), changed)
    galleries = pages_of(cards, sources.config.gallery.page_bytes, writer.assets_bytes + _FRAME_BYTES) or [[]]
    names = ["images.html", *(f"images-{number}.html" for number in range(2, len(galleries) + 1))]
    page_of = {card.facts["id"]: name for name, page in zip(names, galleries, strict=True) for card in page}
    writer.shared = {
        "cautions": cautions,
        "failures": failures,
        "meaning": meaning_of(sources),
        "overview": overview,
        "page_of": page_of,
        "shown": shown,
        "shown_count": whole(len(cards)),
        "verdict": sections.verdict(sources),
    }
    strip = min(_STRIP, len(cards) // 2 or len(cards))
    ends = [card.picture for card in cards]
    writer.page(
        "index.html",
        sources,
        highest=ends[:strip],
        lowest=ends[::-1][:strip] if len(ends) > 1 else [],
        across=_across(cards) if len(cards) > 2 * _STRIP else [],
        listed=int(sources.record["images"]),
        made=sections.made_of(sources),
    )
    for number, (name, page) in enumerate(zip(names, galleries, strict=True)):
        pages = [
            {"name": other, "from": _score(overview, held[0]), "to": _score(overview, held[-1]), "images": len(held)}
            for other, held in zip(names, galleries, strict=True)
            if held
        ]
        writer.page(
            name,
            sources,
            extra=sum(card.bytes - len(card.html.encode()) for card in page),
            template="images.html",
            cards=[card.html for card in page],
            facts=[card.facts for card in page],
            pages=pages,
            number=number,
            choices=list(shown.choices),
            ramp=_ramp(sources.weighting),
        )
    writer.page(
        "model.html",
        sources,
        head=sources.head,
        head_figures=sections.head_figures(sources.head) if sources.head else [],
        metrics=sections.metrics_table(sources.head) if sources.head else [],
        importance=[
            (bundle, sections.importance_figure(bundle), sections.importance_top(bundle))
            for bundle in sources.importance
        ],
    )
    writer.page(
        "trust.html",
        sources,
        validation=sources.validation,
        validation_figures=sections.validation_figures(sources.validation) if sources.validation else [],
        checks=sections.checks_figure(sources.validation) if sources.validation else [],
        facts=sections.heatmap_facts(sources.validation) if sources.validation else [],
        comparison=sources.comparison,
        compared=sources.comparison is not None and sources.is_compared,
        comparison_figures=sections.comparison_figures(sources.comparison) if sources.comparison else [],
    )
    if failures.count:
        writer.page("errors.html", sources)
    writer.page("made.html", sources, made=sections.made_of(sources))
    missing = sum(card.picture["missing"] != "" for card in cards)
    return writer.finish(len(cards), missing, changed)


def _score(overview: sections.Overview | None, card: Card) -> str:
    return overview.score(card.facts["score"]) if overview else ""


def _across(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """Images from the lowest to the highest score, at evenly spaced shares of the run."""
    shares = np.array([card.picture["below_share"] for card in cards])
    wanted = [int(np.abs(shares - target).argmin()) for target in np.linspace(0, 1, _RANGE_STRIP)]
    return [cards[index].picture for index in dict.fromkeys(wanted)]


def _outside(scores: Scores, sources: Sources) -> float | None:
    """Share of the scores beyond the ratings of the test images; ``None`` where these are not known."""
    if sources.head is None or sources.head.predictions is None or scores.count == 0:
        return None
    rated = column(sources.head.predictions, "score")
    rated = rated[np.isfinite(rated)]
    if rated.size == 0:
        return None
    below, above = scores.below_and_above(np.array([rated.min(), rated.max()], np.float32))
    return float(below[0] + above[1]) / scores.count


def _ramp(weighting: str) -> list[tuple[str, str]]:
    """Offsets and colours of the colour map, for the legend."""
    signed = weighting == "signed"
    values = np.linspace(-1 if signed else 0, 1, 21, dtype=np.float32)[None]
    colours = colorize(values, "signed" if signed else "positive")[0]
    return [(f"{index * 5}%", "#" + bytes(colour.tolist()).hex()) for index, colour in enumerate(colours)]
