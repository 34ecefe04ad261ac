"""Charts as SVG: where things are drawn, and that no label becomes markup. Nothing is faked."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ais.report import charts
from ais.report.charts import Interval, Line, Scale, nice_range, nice_step
from ais.report.formats import counted, decimals_for, fixed, percent, short, size

EVIL = '"><script>alert(1)</script>&'


def parsed(svg: str) -> ET.Element:
    """The chart as XML: well-formed, with a name, and no number that a browser would not draw."""
    root = ET.fromstring(f"<div>{svg}</div>")
    assert "nan" not in re.sub(r">[^<]*<", "><", svg).lower()
    chart = root[0]
    assert chart.get("role") == "img"
    assert chart.find("title") is not None
    assert chart.get("aria-label")
    return root


def test_scales_ticks_and_steps() -> None:
    assert Scale(0, 10, 100, 200)([0, 5, 10]).tolist() == [100, 150, 200]
    assert Scale(1, 100, 0, 10, logarithmic=True)([1, 10, 100]) == pytest.approx([0, 5, 10])
    assert Scale(1, 2048, 0, 1, logarithmic=True).ticks() == [1, 10, 100, 1000]
    assert Scale(-1, 1, 0, 1).ticks(4) == [-1, -0.5, 0, 0.5, 1]
    assert [nice_step(value) for value in (0.7, 1, 1.1, 3, 8, 0, np.nan)] == [1, 1, 2, 5, 10, 1, 1]
    assert nice_range([2.3, 8.9]) == (2, 10)
    assert nice_range([np.nan]) == (-1, 1)
    for same in ([5, 5], [0], [1e9, 1e9]):
        low, high = nice_range(same)
        assert low < same[0] < high


def test_a_histogram_has_a_bar_for_every_bin_with_images() -> None:
    edges = charts.bins(0, 10, 10)
    root = parsed(charts.histogram(edges, np.array([1, 0, 3, *[2] * (len(edges) - 4)]), EVIL, EVIL, [(5, EVIL)]))
    for chart in root:  # the wide and the narrow one
        bars = [rect for rect in chart.iter("rect") if rect.get("class") == "bar"]
        assert len(bars) == len(edges) - 2
        heights = sorted({float(bar.get("height")) for bar in bars})
        assert heights == pytest.approx([heights[2] / 3, heights[2] * 2 / 3, heights[2]], abs=0.02)
    assert not list(root.iter("script"))


def test_lines_leave_gaps_thin_out_and_mark_a_point() -> None:
    y = np.ones(5000)
    y[2500] = np.nan
    root = parsed(
        charts.lines([Line(np.arange(5000), y, EVIL), Line(np.arange(3), np.arange(3), "b", dot=1)], "t", "x", "y")
    )
    paths = [path.get("d") for path in root.iter("path") if path.get("class", "").startswith("line main")]
    assert len(paths[0].split("L")) < 1300
    assert len(list(root.iter("circle"))) == 1
    assert "<script" not in ET.tostring(root, "unicode")
    gap = parsed(charts.lines([Line(np.arange(3.0), np.array([1, np.nan, 2]), "")], "t", "x", "y"))
    assert next(path.get("d") for path in gap.iter("path")).count("M") == 2


def test_a_band_and_a_logarithmic_axis() -> None:
    x = np.arange(1, 2049)
    band = Line(x, 1.0 / x, "", low=0.5 / x, high=2.0 / x)
    root = parsed(charts.lines([band], "t", "x", "y", logarithmic=True, x_range=(1, 2048), zero=True))
    assert any(path.get("class") == "band main" for path in root.iter("path"))
    assert "1,000" in [text.text for text in root.iter("text")]


@pytest.mark.parametrize("count", [1, 2, 1500, 40_000])
def test_scatter_as_points_or_squares_of_a_bounded_number(count: int) -> None:
    x = np.random.default_rng(0).normal(size=count)
    root = parsed(charts.scatter(x, x + 0.1, "t", "x", "y"))
    assert len(list(root.iter("circle"))) == (count if count <= 1500 else 0)
    assert len(list(root.iter("rect"))) <= 44 * 44


def test_intervals_and_matrices() -> None:
    rows = [Interval(1, 0.5, 1.5, EVIL), Interval(0.2, np.nan, np.nan, "b"), Interval(np.nan, np.nan, np.nan, "c")]
    root = parsed(charts.intervals(rows, "t", "x"))
    assert len(list(root.iter("circle"))) == 2
    assert "undefined" in [text.text for text in root.iter("text")]
    values = np.array([[np.nan, -0.5], [0.25, np.nan]])
    root = parsed(charts.matrix(["a", EVIL * 4], values, lambda i, j: f"{i}{j}{EVIL}", "t", signed=True, highest=1))
    tiles = {(rect.get("class"), rect.get("fill-opacity")) for rect in root.iter("rect")}
    assert {name for name, _ in tiles} == {"tile empty", "tile negative", "tile positive"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.5), "50.0%"),
        (percent(1), "100%"),
        (percent(0), "0%"),
        (percent(0.99996), "99.9960%"),
        (percent(1 - 1e-7), "99.999990%"),
        (percent(1 - 1e-9), "over 99.999999%"),
        (percent(0.00004), "0.0040%"),
        (percent(float("nan")), "–"),
        (short(0.12345), "0.123"),
        (short(-1234.5), "−1,234"),
        (short(0), "0.00"),
        (short(1e-9), "1.00e−09"),
        (fixed(-0.001, 2), "0.00"),
        (fixed(12345.678, 1), "12,345.7"),
        (fixed(float("inf"), 1), "–"),
        (counted(1, "image"), "1 image"),
        (counted(1_200, "image"), "1,200 images"),
        (size(999), "999 bytes"),
        (size(6_100_000), "6.1 MB"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_decimals_follow_the_spread() -> None:
    assert [decimals_for(spread) for spread in (300, 3, 0.3, 0.004, 0, np.nan)] == [0, 2, 3, 5, 2, 2]
