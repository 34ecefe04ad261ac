"""Thumbnails, layers and links of a report, from real files. Nothing is faked."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ais.images import Limits
from ais.listing import look_up
from ais.placement import normalise_for_display, place_on_image
from ais.render import colorize, overlay
from ais.report.pictures import PictureMaker, Row, link_to, looked_at, strongest_cell
from ais.storage import Folder, Storage
from tests.report_site import picture

STORAGE = Storage()
BLUE = " and lowers the score"


def row(uri: str, size: tuple[int, int], heatmap: np.ndarray, box: tuple[float, ...]) -> Row:
    place = np.array(box, np.float32)
    listed = look_up(uri, STORAGE)
    return Row(7, uri, *size, place, place, heatmap.astype(np.float32), 3.5, None, 1, 0.5, listed)


def draw(one: Row, folder: Path, weighting: str = "positive", max_side: int = 320) -> object:
    with PictureMaker(weighting, max_side, Limits(), STORAGE, STORAGE.open(str(folder)), BLUE) as make:
        return next(make([one]))


@pytest.mark.parametrize("weighting", ["positive", "signed"])
def test_the_layers_blend_to_the_overlay_of_the_run(tmp_path: Path, weighting: str) -> None:
    """What the browser does, opacity times layer over thumbnail, is `ais.render.overlay` of the thumbnail.

    Measured: 0.71 levels of 255 at worst; half of one from rounding, the rest from the opacity's own 255 levels.
    """
    random = np.random.default_rng(0)
    pixels = np.asarray(Image.fromarray(random.integers(0, 255, (5, 5, 3), np.uint8)).resize((200, 160)))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    heatmap = random.normal(size=(7, 7)) if weighting == "signed" else random.random((7, 7))
    one = row(str(tmp_path / "a.png"), (200, 160), heatmap, (20, 0, 180, 160))
    made = draw(one, tmp_path, weighting)
    thumbnail, layer = picture(made.thumbnail), picture(made.overlay).astype(np.float32)
    blended = thumbnail + 0.6 * layer[..., 3:] / 255 * (layer[..., :3] - thumbnail)
    placed = place_on_image(one.heatmap, one.heatmap_box, (160, 200), seen=one.box)
    expected = overlay(thumbnail, normalise_for_display(placed, weighting), weighting, 0.6)
    seen = np.isfinite(placed)
    worst = np.abs(blended - expected)[seen].max()
    assert worst < 1.2, worst
    np.testing.assert_array_equal(layer[~seen][:, 3], 0)
    np.testing.assert_array_equal(picture(made.heatmap), colorize(normalise_for_display(placed, weighting), weighting))
    assert thumbnail.shape == pixels.shape
    assert np.abs(thumbnail.astype(int) - pixels).mean() < 6  # a photograph of noise, at quality 76


def test_a_large_image_is_shown_small_and_nothing_is_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 300)).save(tmp_path / "wide.png")
    assert draw(row(str(tmp_path / "wide.png"), (1000, 300), np.ones((7, 7)), (350, 0, 650, 300)), tmp_path).size == (
        320,
        96,
    )
    Image.new("RGB", (4000, 1)).save(tmp_path / "thread.png")
    assert draw(row(str(tmp_path / "thread.png"), (4000, 1), np.ones((7, 7)), (2000, 0, 2001, 1)), tmp_path).size == (
        320,
        1,
    )
    Image.new("RGB", (30, 20)).save(tmp_path / "tiny.png")
    assert draw(row(str(tmp_path / "tiny.png"), (30, 20), np.ones((7, 7)), (5, 0, 25, 20)), tmp_path).size == (30, 20)


def test_an_original_that_is_gone_changed_or_damaged_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    for name, said in {
        "none.png": "not found",
        "other.png": "changed since it was listed: it had 40 × 30 pixels, and has 8 × 8",
        "bad.png": "truncated",
    }.items():
        made = draw(row(str(tmp_path / name), (40, 30), np.ones((7, 7)), (5, 0, 35, 30)), tmp_path)
        assert made.thumbnail is None
        assert said in made.missing
        assert made.changed == ("changed" in said)
        assert picture(made.heatmap).shape[:2] == (30, 40)


def test_the_strongest_cell_is_in_sight_and_put_into_words() -> None:
    heatmap = np.zeros((4, 4))
    heatmap[3, 0] = 2
    place, words = strongest_cell(row("a", (100, 100), heatmap, (0, 0, 100, 100)), BLUE)
    assert (tuple(map(float, place)), words) == ((0, 75, 25, 25), "strongest at the lower left")
    assert strongest_cell(row("a", (100, 100), -heatmap, (0, 0, 100, 100)), BLUE)[1] == f"{words}{BLUE}"
    heatmap[1, 1] = 1
    one = row("a", (100, 60), heatmap, (0, -20, 100, 80))  # the lowest row is padding of a letterbox
    assert strongest_cell(one, BLUE)[1] == "strongest at the top" or strongest_cell(one, BLUE)[0][1] == 5
    assert strongest_cell(row("a", (100, 100), np.zeros((4, 4)), (0, 0, 100, 100)), BLUE)[1] == "no evidence anywhere"
    assert looked_at(one) == 1
    assert looked_at(row("a", (200, 100), heatmap, (50, 0, 150, 100))) == 0.5


@pytest.mark.parametrize(
    ("uri", "link"),
    [
        ("https://example.org/a b/ü.png?x=1&y=%20", "https://example.org/a%20b/%C3%BC.png?x=1&y=%20"),
        ('http://example.org/"><script>.png', "http://example.org/%22%3E%3Cscript%3E.png"),
        ("https:///nowhere.png", None),
        ("/data/photos/a b#?%.png", "../photos/a%20b%23%3F%25.png"),
        ("/data/site/javascript:alert(1).png", "./javascript%3Aalert%281%29.png"),
        ("s3://bucket/a.png", None),
        ("https://example.org/a.png?X-Amz-Signature=abc", None),
        ("javascript://example.org/%0aalert(1)", None),
        ("data://text/html,<script>", None),
        ("ftp://example.org/a.png", None),
    ],
)
def test_links_lead_to_the_web_or_between_local_files(uri: str, link: str | None) -> None:
    assert link_to(uri, STORAGE.open("/data/site")) == link


def test_pages_in_a_bucket_do_not_link_to_files_of_this_machine() -> None:
    assert link_to("/data/a.png", STORAGE.open("memory://bucket/site")) is None
    assert not isinstance(STORAGE.open("memory://bucket/site").local, Folder)
