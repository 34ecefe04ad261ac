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

import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup

import ais
from ais.images import Limits
from ais.placement import Weighting
from ais.progress import ProgressLine
from ais.render import colorize
from ais.report import sections
from ais.report.formats import counted, percent, short, size, whole
from ais.report.pictures import Picture, PictureMaker, as_rows
from ais.report.scores import Scores, read_scores, shuffled
from ais.report.sources import Sources, column
from ais.secrets import redact

_WRITERS = 16
_ROW_COLUMNS = ("image_id", "uri", "width", "height", "box", "heatmap_box", "heatmap", "score", "score_std")
_ROWS_AT_ONCE = 64  # of which pictures are in memory
_FRAME_BYTES = 24_000  # of a page of images besides the images
_STRIP = 6
_RANGE_STRIP = 6
_OURS = re.compile(r"(index|images|model|trust|errors|made|images-[0-9]+)\.html|images/[0-9]+-[a-z]+\.webp")
_ASSETS = ("report.css", "report.js")
_CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "webp": "image/webp",
}


@dataclass(frozen=True)
class Shown:
    """Images of the gallery.

    Args:
        positions: of the images, highest score first.
        choices: name of each choice, and which images it is of.
        everything: whether this is the whole run.
    """

    positions: Sequence[int]
    choices: dict[str, frozenset[int]]
    everything: bool


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


@dataclass(frozen=True)
class Report:
    """What was written.

    Args:
        index: address of the first page.
        pages: number of pages.
        images: shown.
        missing: images shown without their original, which could not be read again.
        bytes: of everything.
        largest_page_bytes: what opening the largest page costs.
    """

    index: str
    pages: int
    images: int
    missing: int
    bytes: int
    largest_page_bytes: int

    def describe(self) -> str:
        """Say in a few lines what there is to look at."""
        lines = [
            f"pages       {self.pages}, {size(self.bytes)} in all; opening the largest takes "
            f"{size(self.largest_page_bytes)}",
            f"images      {self.images:,} shown"
            + (f", {self.missing:,} of them without their original, which could not be read" if self.missing else ""),
            f"open        {self.index}",
        ]
        return "\n".join(lines)


def write_report(sources: Sources) -> Report:
    """Read the results, choose, draw, write; `report.json` last.

    Raises:
        RunError: a shard of the run cannot be read.
        StorageError: a page cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="ais-report-") as scratch, _Writer(sources) as writer:
        scores = read_scores(sources.run.results.files("*.parquet"), Path(scratch))
        overview = sections.overview_of(scores)
        shown = choose(scores, sources)
        cards = []
        if overview:
            with ProgressLine("pictures", len(shown.positions), silent_s=1) as progress:
                for card in _cards(scores, shown, overview, sources, writer):
                    cards.append(card)
                    progress.advance()
        failures = read_failures(sources)
        return _write_pages(sources, scores, overview, shown, cards, failures, writer)


def choose(scores: Scores, sources: Sources) -> Shown:
    """Positions of the images to show; the whole run where it has no more images than would be chosen."""
    gallery = sources.config.gallery
    wanted = gallery.top + gallery.bottom + gallery.quantiles + gallery.sample + gallery.near_count * len(gallery.near)
    near = {f"near {value:g}": value for value in gallery.near}
    if scores.count <= wanted:
        positions = scores.smallest(lambda _, score: -score, scores.count)
        choices = {
            name: frozenset(scores.smallest(_distance_to(value), gallery.near_count)) for name, value in near.items()
        }
        return Shown(positions, choices, True)
    found = {
        "highest": scores.smallest(lambda _, score: -score, gallery.top),
        "lowest": scores.smallest(lambda _, score: score, gallery.bottom),
        "across the range": _at_quantiles(scores, gallery.quantiles),
        "random sample": scores.smallest(shuffled, gallery.sample),
    } | {name: scores.smallest(_distance_to(value), gallery.near_count) for name, value in near.items()}
    chosen = np.array(sorted({position for positions in found.values() for position in positions}), np.int64)
    order = np.lexsort((scores.ids[chosen], -scores.scores[chosen]))
    choices = {name: frozenset(positions) for name, positions in found.items() if positions}
    return Shown(chosen[order].tolist(), choices, False)


def _distance_to(value: float) -> Any:
    return lambda _, score: np.abs(score.astype(np.float64) - value)


def _at_quantiles(scores: Scores, count: int) -> list[int]:
    """Positions of images at evenly spaced ranks, of equal scores the one with the smallest id."""
    if count == 0:
        return []
    values = scores.quantiles(np.linspace(0, 1, count).tolist() if count > 1 else [0.5])
    best: dict[float, tuple[int, int]] = {}
    for positions, ids, found in scores.chunks():
        for index in np.flatnonzero(np.isin(found, values)):
            candidate = int(ids[index]), int(positions[index])
            best[float(found[index])] = min(candidate, best.get(float(found[index]), candidate))
    return [best[value][1] for value in dict.fromkeys(float(value) for value in values)]


def _cards(
    scores: Scores, shown: Shown, overview: sections.Overview, sources: Sources, writer: _Writer
) -> Iterator[Card]:
    """Draw the images of the gallery and write their pictures; only a few are in memory at a time."""
    weighting: Weighting = "signed" if sources.weighting == "signed" else "positive"
    limits = Limits(**sources.config.limits.model_dump())
    side = sources.config.gallery.max_side
    below, above = scores.below_and_above(scores.scores[np.asarray(shown.positions)])
    with PictureMaker(weighting, side, limits, sources.storage, sources.output) as draw:
        for start in range(0, len(shown.positions), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            table = scores.rows(shown.positions[part], _ROW_COLUMNS)
            rows = as_rows(table, above[part] + 1, below[part] / scores.count)
            for position, picture in zip(shown.positions[part], draw(rows), strict=True):
                yield _card(position, picture, shown, overview, scores.count, writer)


def _card(
    position: int,
    picture: Picture,
    shown: Shown,
    overview: sections.Overview,
    count: int,
    writer: _Writer,
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
        "name": re.split(r"[/\\]", uri.rstrip("/"))[-1] or uri,
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
    """Count errors by reason and keep a few of each, those with the smallest ids; a shard at a time."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for shard in sources.run.errors.files("*.parquet"):
        table = pq.read_table(io.BytesIO(shard.read_bytes()), columns=["image_id", "uri", "stage", "reason", "error"])
        for row in table.to_pylist():
            key = row["stage"], row["reason"]
            counts[key] += 1
            kept = examples.setdefault(key, [])
            kept.append((row["image_id"], redact(row["uri"]), redact(row["error"])))
            if len(kept) > 2 * sources.config.gallery.errors + 16:
                examples[key] = sorted(kept)[: sources.config.gallery.errors]
    reasons = [
        {
            "stage": stage,
            "reason": reason,
            "count": whole(count),
            "share": count / counts.total(),
            "examples": sorted(examples[stage, reason])[: sources.config.gallery.errors],
            "more": whole(max(0, count - sources.config.gallery.errors)),
            "has_more": count > sources.config.gallery.errors,
        }
        for (stage, reason), count in counts.most_common()
    ]
    return Failures(counts.total(), reasons)


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
    writer: _Writer,
) -> Report:
    looked_at = float(np.mean([card.picture["looked_at"] for card in cards])) if cards else None
    cautions = sections.cautions(sources, overview, failures.count, looked_at, _outside(scores, sources))
    galleries = pages_of(cards, sources.config.gallery.page_bytes, writer.assets_bytes + _FRAME_BYTES) or [[]]
    names = ["images.html", *(f"images-{number}.html" for number in range(2, len(galleries) + 1))]
    page_of = {card.facts["id"]: name for name, page in zip(names, galleries, strict=True) for card in page}
    writer.shared = {
        "cautions": cautions,
        "failures": failures,
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
        comparison=sources.comparison,
        compared=sources.comparison is not None and sources.is_compared,
        comparison_figures=sections.comparison_figures(sources.comparison) if sources.comparison else [],
    )
    if failures.count:
        writer.page("errors.html", sources)
    writer.page("made.html", sources, made=sections.made_of(sources))
    missing = sum(card.picture["missing"] != "" for card in cards)
    return writer.finish(len(cards), missing)


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


class _Writer:
    """Renders and writes the files of a report, several at a time, and keeps the book of them."""

    def __init__(self, sources: Sources) -> None:
        package = files("ais.report")
        self.templates = jinja2.Environment(
            loader=jinja2.PackageLoader("ais.report"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self.templates.filters |= {"percent": percent, "short": short, "whole": whole, "counted": counted}
        self.templates.globals["nan"] = float("nan")
        self.shared: dict[str, Any] = {"failures": Failures(0, [])}
        self._assets = {name: (package / "static" / name).read_bytes() for name in _ASSETS}
        self._output = sources.output
        self._sizes: dict[str, int] = {}
        self._opening: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._pending: list[Future[None]] = []
        self._earlier = _files_of_earlier(sources)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def assets_bytes(self) -> int:
        """Of style sheet and script, which every page opens."""
        return sum(map(len, self._assets.values()))

    def write(self, name: str, data: bytes) -> None:
        """Write a file in the background."""
        self._sizes[name] = len(data)
        while len(self._pending) > 4 * _WRITERS:
            self._pending.pop(0).result()
        kind = _CONTENT_TYPES[name.rpartition(".")[2]]
        self._pending.append(self._pool.submit((self._output / name).write_bytes, data, kind))

    def render(self, template: str, sources: Sources, **values: Any) -> bytes:
        """Return a page as bytes."""
        head_title = sources.config.title or sources.run.run_id
        page = self.templates.get_template(template)
        text = page.render(sources=sources, title=head_title, version=ais.__version__, **self.shared, **values)
        return text.encode("utf-8", "backslashreplace")

    def page(self, name: str, sources: Sources, *, template: str = "", extra: int = 0, **values: Any) -> None:
        """Write a page; ``extra`` is what its pictures weigh."""
        data = self.render(template or name, sources, page=name, **values)
        self._opening[name] = len(data) + self.assets_bytes + extra
        self.write(name, data)

    def finish(self, images: int, missing: int) -> Report:
        """Write the assets, wait, remove what an earlier report left, and write the book."""
        for name, data in self._assets.items():
            self.write(f"assets/{name}", data)
        for pending in self._pending:
            pending.result()
        for name in self._earlier - self._sizes.keys():
            with suppress(FileNotFoundError):
                (self._output / name).remove()
        total = sum(self._sizes.values())
        document = {
            "images": images,
            "missing": missing,
            "pages": self._opening,
            "bytes": total,
            "files": sorted(self._sizes),
        }
        (self._output / "report.json").write_text(json.dumps(document, indent=1) + "\n")
        return Report(
            (self._output / "index.html").address,
            len(self._opening),
            images,
            missing,
            total,
            max(self._opening.values()),
        )


def _files_of_earlier(sources: Sources) -> set[str]:
    """Files of an earlier report in the same folder; only names that a report gives."""
    try:
        document = json.loads((sources.output / "report.json").read_bytes())
        names = document["files"]
        return {name for name in names if isinstance(name, str) and _OURS.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
