"""The report in a real browser: headless Chromium on real pages, from disk and from a server. Nothing is faked.

Run by `make browser-test`; fails where there is no browser, and says how to get one.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Error, Page, Request, expect, sync_playwright

from tests.report_site import HOSTILE, everything, report, write_images, write_run

PAGES = ("index", "images", "model", "trust", "errors", "made")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    installed = next(filter(None, map(shutil.which, CHROMIUM)), None)
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not start as root
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=installed, args=quiet + root)
        except Error as error:
            pytest.fail(f"no browser: apt-get install chromium, or .venv/bin/playwright install chromium\n{error}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("everything")
    run, keys = everything(place, weighting="signed")
    sizes = ["gallery.top=12", "gallery.bottom=4", "gallery.quantiles=5", "gallery.sample=6", "gallery.near=[3]"]
    report(run, place / "site", *keys, *sizes, "gallery.near_count=3")
    return place / "site"


class Watched:
    """A page, and all that went wrong on it: messages of the console, errors, dialogs, requests that leave the site."""

    def __init__(self, context: BrowserContext, origin: str) -> None:
        self.page: Page = context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("requestfailed", self._failed)
        self.page.on("request", lambda request: self._ours(request.url, origin))

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # of a lazy picture, by going to the next page
            self.trouble.append(f"failed: {request.url}: {request.failure}")

    def _ours(self, url: str, origin: str) -> None:
        if not url.startswith((origin, "data:,")):
            self.trouble.append(f"request: {url}")


@pytest.fixture
def opened(browser: Browser, site: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The gallery on a desktop, or as the parameter says; whatever goes wrong fails the test."""
    options: dict[str, Any] = {"viewport": DESKTOP, **getattr(request, "param", {})}
    context = browser.new_context(**options)
    watched = Watched(context, site.as_uri())
    watched.page.goto((site / "images.html").as_uri())
    yield watched.page
    context.close()
    assert watched.trouble == []


def shown(page: Page) -> list[int]:
    """Ids of the cards that can be seen, in their order."""
    ids = "cards => cards.filter(card => card.offsetParent).map(card => Number(card.id.slice(6)))"
    return page.locator(".card").evaluate_all(ids)


def score_of(page: Page, image_id: int) -> float:
    text = page.locator(f"#image-{image_id} .score").inner_text()
    return float(text.removeprefix("Score").split("±")[0].replace("−", "-"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_page_fits_and_nothing_goes_wrong(browser: Browser, site: Path, viewport: Any, scheme: Any) -> None:
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    watched = Watched(context, site.as_uri())
    page = watched.page
    for name in PAGES:
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], name
        assert page.evaluate("getComputedStyle(document.body).margin") == "0px", name  # the style sheet is there
        for image in page.locator("img").all():
            image.scroll_into_view_if_needed()
        broken = "images => images.filter(i => i.offsetParent && !(i.complete && i.naturalWidth)).map(i => i.src)"
        page.wait_for_function("[...document.images].every(image => image.complete)")
        assert page.locator("img").evaluate_all(broken) == [], name
    context.close()
    assert watched.trouble == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_by_the_rules_that_can_be_checked(browser: Browser, site: Path, scheme: Any) -> None:
    """WCAG 2.2 A and AA with axe-core, contrast of text and the open viewer included."""
    context = browser.new_context(viewport=DESKTOP, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    for name in (*PAGES, "viewer"):
        page.goto((site / f"{'images' if name == 'viewer' else name}.html").as_uri())
        for details in page.locator("details").all():
            details.evaluate("details => details.open = true")
        if name == "viewer":
            page.locator(".triptych").first.click()
        found = Axe().run(page, options=rules).response["violations"]
        told = [(rule["id"], rule["help"], [node["html"][:160] for node in rule["nodes"]][:4]) for rule in found]
        assert told == [], name
    context.close()


def test_the_slider_and_the_keys_set_the_strength_of_the_overlay(opened: Page) -> None:
    opacity = "element => getComputedStyle(element).opacity"
    heat = opened.locator(".card .heat").first
    assert heat.evaluate(opacity) == "0.6"
    opened.locator("#strength").fill("25")
    expect(opened.locator("#strength-text")).to_have_text("25%")
    expect(heat).to_have_css("opacity", "0.25")
    opened.locator("h1").click()
    opened.keyboard.press("+")  # nothing: no image has the focus
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("+")
    expect(heat).to_have_css("opacity", "0.35")
    for _ in range(12):
        opened.keyboard.press("-")
    expect(heat).to_have_css("opacity", "0")
    assert opened.locator("#strength").input_value() == "0"


def test_filter_order_and_clear(opened: Page) -> None:
    assert opened.evaluate("scrollY") == 0
    every = shown(opened)
    scores = [score_of(opened, image_id) for image_id in every]
    assert scores == sorted(scores, reverse=True)
    middle = scores[len(scores) // 2]
    opened.locator("#filter-low").fill(str(middle))
    expected = [image_id for image_id, score in zip(every, scores, strict=True) if score >= middle]
    assert shown(opened) == expected
    expect(opened.locator("#count")).to_have_text(f"{len(expected)} of {len(every)} images")
    opened.locator("#order").select_option("low")
    assert shown(opened) == expected[::-1]
    opened.locator("#filter-high").fill("-1")
    assert shown(opened) == []
    expect(opened.locator("#none")).to_be_visible()
    opened.locator("#reset").click()
    assert shown(opened) == every[::-1]
    opened.locator("#filter-text").fill("PHOTO-00")
    assert len(shown(opened)) > 1
    opened.locator("#filter-text").fill("0")
    assert shown(opened)[-1] == 0  # the id, not every name with a zero in it
    opened.locator("#filter-text").fill("")
    opened.locator("#filter-choice").select_option("highest")
    assert sorted(shown(opened)) == list(range(12))
    opened.locator("#order").select_option("spread")
    spreads = [float(opened.locator(f"#image-{i} .spread").inner_text()[2:]) for i in shown(opened)]
    assert spreads == sorted(spreads, reverse=True)


def test_browsing_with_the_keyboard_and_the_viewer(opened: Page) -> None:
    ids = shown(opened)
    focused = "document.activeElement.id"
    for key, place in (("ArrowRight", 0), ("j", 1), ("ArrowRight", 2), ("k", 1)):
        opened.keyboard.press(key)
        assert opened.evaluate(focused) == f"image-{ids[place]}"
    opened.keyboard.press("Enter")
    viewer = opened.locator("#viewer")
    expect(viewer).to_be_visible()
    expect(viewer.locator("#viewer-body .name")).to_have_text(opened.locator(f"#name-{ids[1]}").inner_text())
    assert opened.locator("#name-" + str(ids[1])).count() == 1  # no id twice
    opened.keyboard.press("ArrowRight")
    expect(viewer.locator("#viewer-body .name")).to_have_text(opened.locator(f"#name-{ids[2]}").inner_text())
    viewer.locator("#viewer-previous").click()
    expect(viewer.locator("#viewer-body .name")).to_have_text(opened.locator(f"#name-{ids[1]}").inner_text())
    viewer.locator("#viewer-strength").fill("100")
    expect(viewer.locator(".heat")).to_have_css("opacity", "1")
    opened.keyboard.press("Escape")
    expect(viewer).not_to_be_visible()
    assert opened.evaluate(focused) == f"image-{ids[1]}"
    opened.locator(f"#image-{ids[3]} .triptych").click()
    expect(viewer).to_be_visible()
    viewer.locator("#viewer-close").click()
    opened.locator(f"#image-{ids[4]} .enlarge").focus()
    opened.keyboard.press("Enter")
    expect(viewer.locator("#viewer-body .name")).to_have_text(opened.locator(f"#name-{ids[4]}").inner_text())
    viewer.locator("#viewer-close").click()
    expect(viewer).not_to_be_visible()
    # Typing a name does not browse.
    opened.locator("#filter-text").press_sequentially("j")
    assert opened.evaluate(focused) == "filter-text"


def test_closing_the_viewer_takes_the_focus_from_nobody(opened: Page) -> None:
    """A dialog's "close" event comes after the closing, when somebody may have gone on to a field."""
    opened.locator(f"#image-{shown(opened)[0]} .enlarge").click()
    focused = opened.evaluate("""() => new Promise((settle) => {
        const viewer = document.getElementById("viewer");
        viewer.addEventListener("close", () => setTimeout(() => settle(document.activeElement.id)));
        document.getElementById("viewer-close").click();
        document.getElementById("filter-text").focus();
    })""")
    assert focused == "filter-text"


def test_names_with_markup_do_nothing(opened: Page) -> None:
    assert "owned" not in opened.title()
    assert opened.locator("img[src='x'], [onmouseover], [onerror]").count() == 0
    names = opened.locator(".card .name").all_inner_texts()
    assert {name.replace("/", "∕").replace("\n", " ") for name in HOSTILE} <= {
        name.replace("\n", " ") for name in names
    }
    for card in opened.locator(".card").all():
        card.hover()
    opened.locator("#filter-text").fill("<img")
    assert shown(opened) == [0]
    opened.locator("#image-0 .triptych").click()
    expect(opened.locator("#viewer-body .name")).to_contain_text("<img src=x")
    for link in opened.locator(".card a").all():
        assert link.evaluate("link => link.protocol") == "file:"


def test_a_cell_is_drawn_to_scale_and_layers_lie_on_the_image(opened: Page) -> None:
    # Images are 96, 150 × 100, 80 × 200 … pixels; what the model saw is 7/8 of the shorter side, in 7 cells.
    for image_id, (width, height) in {0: (96, 96), 1: (150, 100), 2: (80, 200)}.items():
        pic = opened.locator(f"#image-{image_id} figure:nth-child(2) .pic")
        box = pic.bounding_box()
        assert box is not None
        assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.02)
        cell = pic.locator("rect.cell").last.evaluate(
            "r => { const b = r.getBoundingClientRect(); return [b.width, b.height] }"
        )
        side = min(width, height) / 8
        assert cell[0] == pytest.approx(side * box["width"] / width, rel=0.06, abs=0.5)
        assert cell[1] == pytest.approx(side * box["height"] / height, rel=0.06, abs=0.5)
        for layer in ("img:first-child", "img.heat", "svg.marks"):
            other = pic.locator(layer).bounding_box()
            assert other == pytest.approx(box, abs=1), layer


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_everything_can_be_read(opened: Page) -> None:
    expect(opened.locator("#tools")).to_be_hidden()
    expect(opened.locator("#viewer")).to_be_hidden()
    assert opened.locator(".card").count() > 20
    expect(opened.locator(".card .heat").first).to_have_css("opacity", "0.6")
    expect(opened.locator(".card").first).to_be_visible()


@pytest.mark.parametrize("opened", [{"reduced_motion": "reduce"}], indirect=True)
def test_who_asks_for_stillness_gets_it(opened: Page) -> None:
    assert opened.locator(".heat").first.evaluate("e => getComputedStyle(e).transitionDuration") == "0s"


def test_printed_pages_leave_out_what_paper_cannot_do(opened: Page) -> None:
    opened.emulate_media(media="print")
    expect(opened.locator("#tools")).to_be_hidden()
    expect(opened.locator(".top nav")).to_be_hidden()
    expect(opened.locator(".card").first).to_be_visible()
    assert opened.pdf(print_background=True).startswith(b"%PDF")


def test_from_a_server_under_a_folder_as_from_a_bucket(browser: Browser, site: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site.parent)
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{server.server_port}/site/"
        context = browser.new_context(viewport=DESKTOP)
        watched = Watched(context, origin)
        watched.page.goto(f"{origin}index.html")
        watched.page.get_by_role("link", name="Images", exact=True).click()
        expect(watched.page.locator("#count")).to_contain_text("images")
        watched.page.goto(f"{origin}images.html#image-3")
        expect(watched.page.locator("#image-3")).to_be_in_viewport()
        context.close()
        server.shutdown()
    assert watched.trouble == []


def test_a_report_of_one_image_and_one_of_errors_only(browser: Browser, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", ["only.png"])
    one = write_run(tmp_path, [str(paths[0])], [3.0], run_id="one")
    none = write_run(tmp_path, [], [], run_id="none", failures=[("/a.png", "truncated", "x")])
    for run, name in ((one, "one"), (none, "none")):
        report(run, tmp_path / "sites" / name)
        context = browser.new_context(viewport=PHONE)
        watched = Watched(context, (tmp_path / "sites").as_uri())
        for page in sorted((tmp_path / "sites" / name).glob("*.html")):
            watched.page.goto(page.as_uri())
            expect(watched.page.locator("h1")).to_be_visible()
            assert watched.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        context.close()
        assert watched.trouble == []
