"""Templates in, files out: several at a time, and a book of them."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2

import ais
from ais.report.failures import Failures
from ais.report.formats import counted, percent, short, size, whole
from ais.report.sources import Sources

_WRITERS = 16
_OURS = re.compile(r"(index|images|model|trust|errors|made|images-[0-9]+)\.html|images/[0-9]+-[a-z]+\.webp")
_ASSETS = ("report.css", "report.js")
_CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "webp": "image/webp",
}


@dataclass(frozen=True)
class Report:
    """What was written.

    Args:
        index: address of the first page.
        pages: number of pages.
        images: shown.
        missing: images shown without their original.
        changed: those of them whose original is no longer the one that was scored; of the others it could not be read.
        bytes: of everything.
        largest_page_bytes: what opening the largest page costs.
    """

    index: str
    pages: int
    images: int
    missing: int
    changed: int
    bytes: int
    largest_page_bytes: int

    def describe(self) -> str:
        """Say in a few lines what there is to look at."""
        reasons = ((self.changed, "changed since"), (self.missing - self.changed, "could not be read"))
        why = ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)
        lines = [
            f"pages       {self.pages}, {size(self.bytes)} in all; opening the largest takes "
            f"{size(self.largest_page_bytes)}",
            f"images      {self.images:,} shown"
            + (f", {self.missing:,} of them without their original: {why}" if self.missing else ""),
            f"open        {self.index}",
        ]
        return "\n".join(lines)


class Writer:
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
        self.shared: dict[str, Any] = {"failures": Failures(0, [])}
        self._assets = {name: (package / "static" / name).read_bytes() for name in _ASSETS}
        self._output = sources.output
        self._sizes: dict[str, int] = {}
        self._opening: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._pending: list[Future[None]] = []
        self._earlier = _files_of_earlier(sources)

    def __enter__(self) -> Writer:
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

    def finish(self, images: int, missing: int, changed: int) -> Report:
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
            "changed": changed,
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
            changed,
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
