"""`jobs/report.py` on run folders of real images written by `tests.report_site`; pages as a parser of HTML sees them.

The browser's own part (clicks, contrast, the keyboard) is in tests/browser; the script's logic runs here in V8.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element

import html5lib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from py_mini_racer import MiniRacer

from ais.config import ReportConfig
from ais.errors import AisError, ConfigError, RunError, StorageError
from ais.listing import ListedImage
from ais.report import open_sources
from ais.report.meaning import meaning_of
from ais.report.versions import Versions
from ais.settings import parse_config
from ais.storage import Storage
from jobs.report import main
from tests import report_site
from tests.report_site import HOSTILE, digest_of, everything, report, write_images, write_run
from tests.s3.server import S3Server

ROOT = Path(__file__).parents[2]


def parse(page: Path) -> Element:
    """The page as a browser understands it; an error of HTML is an error here."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page.read_text())


def text_of(page: Path) -> str:
    return " ".join(" ".join(parse(page).itertext()).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of everything, with few images so that some are left out, and small pages."""
    place = tmp_path_factory.mktemp("everything")
    run, keys = everything(place)
    sizes = ["gallery.top=12", "gallery.bottom=4", "gallery.quantiles=5", "gallery.sample=6", "gallery.near=[3]"]
    report(run, place / "site", *keys, *sizes, "gallery.near_count=3", "gallery.errors=2", "gallery.page_bytes=120000")
    return place / "site"


def pages(site: Path) -> Iterator[tuple[str, Element]]:
    found = sorted(site.glob("*.html"))
    assert {"index", "images", "model", "trust", "errors", "made"} <= {page.stem for page in found}
    for page in found:
        yield page.name, parse(page)


def test_pages_are_valid_and_name_what_they_are(site: Path) -> None:
    for name, page in pages(site):
        assert page.get("lang") == "en", name
        assert len(list(page.iter("h1"))) == 1, name
        assert len(list(page.iter("main"))) == 1, name
        ids = [element.get("id") for element in page.iter() if element.get("id")]
        assert len(ids) == len(set(ids)), name
        levels = [int(element.tag[1]) for element in page.iter() if element.tag in ("h1", "h2", "h3")]
        assert levels[0] == 1, name
        assert all(after - before <= 1 for before, after in pairwise(levels)), name
        for image in page.iter("img"):
            assert image.get("alt") is not None, name
            assert image.get("width"), name
        for chart in page.iter("svg"):
            assert chart.get("aria-hidden") == "true" or chart.get("aria-label"), name
        for label in page.iter("label"):
            assert any(child.tag in ("input", "select") for child in label.iter()), name


def test_nothing_comes_from_elsewhere_and_nothing_runs_inline(site: Path) -> None:
    for name, page in pages(site):
        policies = [meta.get("content") for meta in page.iter("meta") if meta.get("http-equiv")]
        assert policies == [policy for policy in policies if policy.startswith("default-src 'none'")], name
        assert len(policies) == 1, name
        assert "unsafe" not in policies[0], name
        for element in page.iter():
            assert not [key for key in element.attrib if str(key).startswith("on")], name
            assert element.get("style") is None, name
            for key in ("src", "srcset", "action", "formaction", "poster", "data"):
                value = element.get(key)
                assert value is None or not (urlsplit(value).scheme or value.startswith("//")), (name, value)
        scripts = [script for script in page.iter("script") if script.get("type") != "application/json"]
        assert [script.get("src") for script in scripts] == ["assets/report.js"], name
        assert not list(page.iter("style")), name


def test_links_lead_somewhere(site: Path) -> None:
    known = {name: {element.get("id") for element in page.iter()} for name, page in pages(site)}
    gone = {"photo-002.png", "photo-003.png"}  # everything() removes one and changes another
    seen = set()
    for name, page in pages(site):
        for element in page.iter():
            for key in ("href", "src"):
                value = element.get(key)
                if value is None or value == "data:,":
                    continue
                parts = urlsplit(value)
                assert parts.scheme == "", value
                target = site / unquote(parts.path) if parts.path else site / name
                assert target.exists() or target.name in gone, value
                if parts.fragment:
                    assert unquote(parts.fragment) in known[target.name], value
                seen.add(target.suffix)
    assert {".html", ".png", ".webp", ".css", ".js"} <= seen


def test_names_with_markup_are_text(site: Path) -> None:
    shown = {}
    for name, page in pages(site):
        if not name.startswith("images"):
            continue
        facts = next(script.text for script in page.iter("script") if script.get("id") == "facts")
        shown |= {fact["id"]: Path(fact["uri"]).name for fact in json.loads(facts)}
        words = "".join(page.itertext())
        for fact in json.loads(facts):
            assert Path(fact["uri"]).name in words
        raw = (site / name).read_text()
        assert "<img src=x" not in raw
        assert "49.png" not in raw  # {{ 7*7 }}
        assert raw.count("</script>") == 2
    assert {name.replace("/", "∕") for name in HOSTILE} <= set(shown.values())
    assert "<script>alert(1)" in "".join(parse(site / "errors.html").itertext())
    assert len(list(parse(site / "errors.html").iter("script"))) == 1


def test_pages_keep_their_budget_and_the_book_is_right(site: Path) -> None:
    book = json.loads((site / "report.json").read_text())
    assert sorted(path for path in digest_of(site) if path != "report.json") == book["files"]
    galleries = sorted(site.glob("images*.html"))
    assert len(galleries) > 1
    for gallery in galleries:
        links = {element.get("src") for element in parse(gallery).iter() if element.get("src")}
        opened = sum((site / link).stat().st_size for link in links) + gallery.stat().st_size
        opened += (site / "assets" / "report.css").stat().st_size
        assert opened <= 120_000
        assert book["pages"][gallery.name] >= opened - 8_000
    cards = [element.get("id") for gallery in galleries for element in parse(gallery).iter("article")]
    assert len(cards) == len(set(cards)) == book["images"]


def test_what_a_reader_learns(site: Path) -> None:
    index, trust, errors, model = (text_of(site / f"{name}.html") for name in ("index", "trust", "errors", "model"))
    assert "40 images scored by a head on tiny" in index
    assert "The backbone is UNTRAINED" in index
    assert "Validation passed in part" in index
    assert "Could not be used 12 23.1% of the images" in index
    assert "One cell covers 1/7 of the width" in index
    assert "Spread between heads" in index
    assert "beats <b>chance</b>" in trust
    assert "heads that were never fitted 0.995 (0.990 to 0.998)" in trust
    assert "inside the mask 0.950 (0.900 to 1.00); by chance 0.0900" in trust
    assert "of other heatmaps" not in trust  # the same weighting
    assert "2 <b>" in trust or "two <b>" in trust
    assert errors.index("truncated") < errors.index("not an <i>image</i>")
    assert "and 6 more" in errors
    assert "Predicted against rated" in model
    assert "AIS ranking, objective error" in model
    gallery = "".join(text_of(page) for page in sorted(site.glob("images*.html")))
    assert "The original is not shown: not found" in gallery
    assert "changed since it was listed: it had 96 × 96 pixels, and has 7 × 5" in gallery
    first = text_of(site / "images.html")
    assert "rank 1 of 40" in first
    assert "above 97.5% of the run" in first
    assert "± 0.1" in first


def test_every_chart_has_a_sentence(site: Path) -> None:
    figures = [
        figure
        for _, page in pages(site)
        for figure in page.iter("figure")
        if figure.get("class", "").startswith("plot")
    ]
    assert len(figures) >= 12
    for figure in figures:
        words = " ".join(next(figure.iter("figcaption")).itertext())
        assert len(words.split()) > 8
        assert words.rstrip().endswith("."), words


def test_a_small_run_is_shown_whole(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", [f"{index}.png" for index in range(11)])
    run = write_run(
        tmp_path, [str(path) for path in paths], np.arange(11.0).tolist(), weighting="signed", untrained=False
    )
    made = report(run, tmp_path / "site")
    assert made.images == 11
    words = text_of(tmp_path / "site" / "images.html")
    assert "All 11 images of the run" in words
    assert "lowers the score · none · raises the score" in words
    assert "UNTRAINED" not in text_of(tmp_path / "site" / "index.html")
    assert not (tmp_path / "site" / "errors.html").exists()
    assert "no evidence anywhere" in words  # the sixth heatmap is zero


def test_one_image(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", ["only.png"])
    run = write_run(tmp_path, [str(paths[0])], [3.0])
    assert report(run, tmp_path / "site").images == 1
    words = text_of(tmp_path / "site" / "index.html")
    assert "1 image scored" in words
    assert "Lowest" not in words


def test_errors_only(tmp_path: Path) -> None:
    run = write_run(tmp_path, [], [], failures=[("/i/a.png", "truncated", "JPEG of 12 bytes")])
    report(run, tmp_path / "site")
    words = text_of(tmp_path / "site" / "index.html")
    assert "Every image that was tried failed" in words
    assert "100% of the images could not be used" in words
    for page in (tmp_path / "site").glob("*.html"):
        parse(page)


def test_a_run_that_is_not_complete_says_so(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", ["a.png", "b.png"])
    run = write_run(tmp_path, [str(path) for path in paths], [1.0, float("nan")], complete=False)
    report(run, tmp_path / "site")
    words = text_of(tmp_path / "site" / "index.html")
    assert "The run is not complete" in words
    assert "1 score not finite" in words


def test_a_gallery_of_nothing(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", ["a.png", "b.png"])
    run = write_run(tmp_path, [str(path) for path in paths], [1.0, 2.0])
    none = [f"gallery.{key}=0" for key in ("top", "bottom", "quantiles", "sample")]
    assert report(run, tmp_path / "site", *none).images == 0
    assert "None were asked for" in text_of(tmp_path / "site" / "images.html")
    assert "2 images scored" in text_of(tmp_path / "site" / "index.html")


def test_equal_scores_and_extreme_ones(tmp_path: Path) -> None:
    for name, scores in {"equal": [2.0] * 5, "far": [1.0, 1.1, 1.2, 1.3, 3e30]}.items():
        paths = write_images(tmp_path / name / "photos", [f"{index}.png" for index in range(5)])
        run = write_run(tmp_path / name, [str(path) for path in paths], scores)
        assert report(run, tmp_path / name / "site").images == 5
        for page in (tmp_path / name / "site").glob("*.html"):
            parse(page)


def test_made_again_it_is_the_same_and_leaves_nothing_behind(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", [f"{index}.png" for index in range(8)])
    run = write_run(
        tmp_path, [str(path) for path in paths], np.arange(8.0).tolist(), failures=[("/a", "truncated", "x")]
    )
    site = tmp_path / "site"
    report(run, site)
    first = digest_of(site)
    report(run, site)
    assert digest_of(site) == first
    # Fewer images and no errors: what is left over goes, what is not ours stays.
    (site / "notes.txt").write_text("mine")
    book = json.loads((site / "report.json").read_text())
    (tmp_path / "precious.webp").write_text("mine")
    book["files"] += ["../precious.webp", "notes.txt", "images/../../precious.webp"]
    (site / "report.json").write_text(json.dumps(book))
    small = write_run(tmp_path / "small", [str(paths[0])], [1.0])
    report(small, site)
    assert sorted(path.name for path in (site / "images").iterdir()) == [
        "0-heatmap.webp",
        "0-image.webp",
        "0-overlay.webp",
    ]
    assert not (site / "errors.html").exists()
    assert (site / "notes.txt").exists()
    assert (tmp_path / "precious.webp").exists()


def test_from_and_into_an_object_store(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    """Run, images and pages in a bucket, one image on this machine; a browser is told what each object is."""
    storage = Storage(endpoint_url=s3.endpoint_url)
    paths = write_images(tmp_path / "photos", ["a & b.png", "b.png"])
    (storage.open(bucket) / "photos" / "a & b.png").write_bytes(paths[0].read_bytes())
    uris = [f"{bucket}/photos/a & b.png", str(paths[1])]
    run = write_run(f"{bucket}/out", uris, [2.0, 1.0], storage=storage)
    made = report(run, f"{bucket}/site", f"storage.endpoint_url={s3.endpoint_url}")
    assert (made.index, made.images, made.missing) == (f"{bucket}/site/index.html", 2, 0)
    site = storage.open(f"{bucket}/site")
    page = (site / "images.html").read_bytes().decode()
    assert f"{bucket}/photos/a &amp; b.png" in page
    assert "open the original" not in page
    kinds = {"index.html": "text/html", "assets/report.css": "text/css", "assets/report.js": "text/javascript"}
    for name, kind in {**kinds, "images/0-image.webp": "image/webp"}.items():
        assert site.filesystem.info((site / name).path)["ContentType"].startswith(kind)


def test_an_original_that_was_replaced_is_not_shown_under_the_heatmap_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pixels say nothing: the new ones have the same size. Of files it is size and time, wherever in the manifest."""
    paths = write_images(tmp_path / "photos", [f"{index}.png" for index in range(9)])
    run = write_run(tmp_path, [str(path) for path in paths], np.arange(9.0).tolist(), untrained=False)
    assert report(run, tmp_path / "before").missing == 0
    times = [path.stat().st_mtime for path in paths]
    fresh = write_images(tmp_path / "fresh", [path.name for path in paths], seed=1)
    for index, moved in ((2, 100), (5, 0)):
        paths[index].write_bytes(fresh[index].read_bytes())
        os.utime(paths[index], (times[index] + moved,) * 2)
    paths[7].unlink()
    assert main([f"run={run}", f"output={tmp_path}/after"]) == 0
    said = "9 shown, 3 of them without their original: 2 changed since, 1 could not be read"
    assert said in capsys.readouterr().out
    gallery = parse(tmp_path / "after" / "images.html")
    cards = {card.get("id"): " ".join(card.itertext()) for card in gallery.iter("article")}
    assert "not shown: changed since it was listed: it was last changed at" in cards["image-2"]
    assert re.search(r"not shown: changed since it was listed: it had [\d,]+ bytes, and has", cards["image-5"])
    assert "not shown: not found" in cards["image-7"]
    assert sum("not shown" in card for card in cards.values()) == 3
    assert "2 originals changed since the run" in text_of(tmp_path / "after" / "index.html")
    book = json.loads((tmp_path / "after" / "report.json").read_text())
    assert (book["missing"], book["changed"]) == (3, 2)
    next((Path(run) / "manifest").iterdir()).unlink()
    with pytest.raises(RunError, match=r"manifest' cannot be read: .* which versions"):
        report(run, tmp_path / "lost")


def test_a_replaced_object_is_told_by_its_etag_alone(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    storage = Storage(endpoint_url=s3.endpoint_url)
    paths = write_images(tmp_path, ["a.png", "b.png"])
    places = [storage.open(bucket) / path.name for path in paths]
    for place, path in zip(places, paths, strict=True):
        place.write_bytes(path.read_bytes())
    run = write_run(tmp_path, [place.address for place in places], [2.0, 1.0], storage=storage)
    next((Path(run) / "manifest").iterdir()).unlink()  # which is not asked
    assert report(run, tmp_path / "before", f"storage.endpoint_url={s3.endpoint_url}").missing == 0
    places[1].write_bytes(write_images(tmp_path / "fresh", ["x.png", "b.png"], seed=1)[1].read_bytes())
    made = report(run, tmp_path / "after", f"storage.endpoint_url={s3.endpoint_url}")
    assert (made.missing, made.changed) == (1, 1)
    assert "changed since it was listed: its etag is no longer" in text_of(tmp_path / "after" / "images.html")


def test_versions_are_looked_up_in_the_part_they_are_in(tmp_path: Path) -> None:
    """Parts of five images, of which only the row groups with these ids are read."""
    manifest = Storage().open(str(tmp_path))
    for part, ids in enumerate((range(5), range(5, 10), range(10, 12))):
        columns = {"image_id": ids, "size": [100 + n for n in ids], "mtime": [n / 2 for n in ids]}
        pq.write_table(pa.table(columns), tmp_path / f"part-{part:05d}.parquet", row_group_size=2)
    ids = [11, 0, 7, 5, 4]
    results = pa.table(
        {"image_id": ids, "uri": [f"/i/{n}.png" for n in ids], "etag": pa.array([None, "x", None, None, None])}
    )
    found = Versions(manifest)(results)
    assert found == [ListedImage(f"/i/{n}.png", 100 + n, "x" if n == 0 else None, n / 2) for n in ids]
    assert Versions(manifest)(pa.table({"image_id": [3], "uri": ["s3://b/3.png"], "etag": ["y"]})) == [
        ListedImage("s3://b/3.png", etag="y")
    ]
    with pytest.raises(RunError, match="cannot be read"):
        Versions(manifest)(pa.table({"image_id": [12], "uri": ["/i/12.png"], "etag": pa.nulls(1, pa.string())}))


def test_a_comparison_of_another_run_of_this_name_is_not_of_this_one(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", ["a.png"])
    run = write_run(tmp_path, [str(paths[0])], [1.0])
    comparison = report_site.write_comparison(tmp_path / "comparison", ["x", "y"])
    book = tmp_path / "comparison" / "summary.json"
    document = json.loads(book.read_text())
    own = json.loads((Path(run) / "run.json").read_text())["identity"]
    for name, identity, compared in (
        ("own", own, True),
        ("other", own | {"images": "/elsewhere"}, False),
        ("another weighting", own | {"weighting": "signed"}, False),
    ):
        document["runs"][0] |= {"run_id": "photos", "identity": identity, "address": f"/{name}/runs/photos"}
        book.write_text(json.dumps(document))
        words = words_of(tmp_path / name, run, f"comparison={comparison}")
        assert ("This run is not among them" in words["trust"]) == (not compared)


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", ["a.png"])
    run = write_run(tmp_path, [str(paths[0])], [1.0])
    head = report_site.write_head(tmp_path / "head")
    (tmp_path / "head" / "head.json").write_text('{"sha256": "cccc"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "validation.json").write_text("[1]")
    comparison = report_site.write_comparison(tmp_path / "comparison", ["a", "b"])
    (tmp_path / "comparison" / "matrices.parquet").unlink()
    for keys, said in {
        (f"run={tmp_path}", f"output={tmp_path}/o"): rf"run: .* holds no run .*did you mean '{run}'",
        (f"run={tmp_path}/photos", f"output={tmp_path}/o"): "OUTPUT/runs/RUN_ID",
        (f"run={run}", f"output={run}"): "output: .* holds a run of jobs/heatmaps.py",
        (f"run={run}", f"output={tmp_path}/o", f"head={head}"): "head: the run was made with the head aaaa.*cccc",
        (f"run={run}", f"output={tmp_path}/o", f"head={tmp_path}/none"): "not a head bundle: it has no head.json",
        (f"run={run}", f"output={tmp_path}/o", f"validation={tmp_path}/broken"): "not a JSON object",
        (f"run={run}", f"output={tmp_path}/o", f"comparison={comparison}"): "no matrices.parquet",
    }.items():
        with pytest.raises(AisError, match=said):
            open_sources(parse_config(ReportConfig, "", keys))
    damaged = report_site.write_validation(tmp_path / "damaged", "PASSED: all of it.")
    curves = tmp_path / "damaged" / "curves.parquet"
    curves.write_bytes(curves.read_bytes()[:4] + bytes(200) + curves.read_bytes()[204:])
    with pytest.raises(StorageError, match=r"validation: .*damaged' is not as this version writes it"):
        open_sources(parse_config(ReportConfig, "", [f"run={run}", f"output={tmp_path}/o", f"validation={damaged}"]))
    (tmp_path / "head" / "head.json").unlink()
    (tmp_path / "head" / "head.json").mkdir()
    with pytest.raises(StorageError, match=r"head/head\.json' cannot be read: IsADirectoryError"):
        open_sources(parse_config(ReportConfig, "", [f"run={run}", f"output={tmp_path}/o", f"head={head}"]))
    with pytest.raises(ConfigError, match=r"near: expected list \[number, ...\], got \"high\""):
        parse_config(ReportConfig, "", [f"run={run}", "output=o", "gallery.near=high"])


@pytest.mark.parametrize(
    ("importance", "weighting", "conclusion", "level", "said"),
    [
        (None, "positive", "PASSED: all of it.", "good", "Speaks for it Validation passed. All of it."),
        (None, "signed", "PASSED: all of it.", "care", "positive weighting; those of this run have signed weighting."),
        ("c" * 64, "positive", "PASSED: all of it.", "care", "those of this run are weighted by one importance"),
        ("c" * 64, "signed", "PASSED: all of it.", "care", "What it found: validation passed. All of it."),
        ("c" * 64, "positive", "FAILED: the head guesses.", "stop", "found: validation failed. The head guesses."),
    ],
)
def test_a_validation_of_other_heatmaps_vouches_for_nothing(
    tmp_path: Path, importance: str | None, weighting: str, conclusion: str, level: str, said: str
) -> None:
    paths = write_images(tmp_path / "photos", ["a.png"])
    run = write_run(tmp_path, [str(paths[0])], [1.0], untrained=False, importance=importance, weighting=weighting)
    validation = report_site.write_validation(tmp_path / "validation", conclusion)
    report(run, tmp_path / "site", f"validation={validation}", f"head={report_site.write_head(tmp_path / 'head')}")
    for name in ("index", "trust"):
        page = parse(tmp_path / "site" / f"{name}.html")
        verdict = next(aside for aside in page.iter("aside") if "verdict" in aside.get("class", ""))
        assert verdict.get("class") == f"verdict {level}"
        words = " ".join(" ".join(verdict.itertext()).split())
        assert said in words
        assert ("Validation is of other heatmaps" in words) == (level != "good")
        assert ("Speaks for it" in words) == (level == "good")


@pytest.mark.parametrize("level", ["collective", "individual"])
def test_an_importance_measured_against_people_is_not_relied_on(tmp_path: Path, level: str) -> None:
    uris = [str(path) for path in write_images(tmp_path / "photos", ["a.png"])]
    for r, heading in ((0.6, "Keep in mind"), (-0.6, "Do not rely on it")):
        correlation = {"value": r, "low": r - 0.1, "high": r + 0.1}
        place = tmp_path / f"{r}"
        bundle = report_site.write_importance(place, "similarity", level=level, correlation=correlation)
        digest = report_site.importance_digest(bundle)
        run = write_run(tmp_path / f"run{r}", uris, [1.0], importance=digest, untrained=False)
        words = words_of(place / "site", run, f"importance=[{bundle}]")
        for name in ("index", "trust"):
            assert ("Importance was measured against people" in words[name]) == (r < 0)
        assert words["index"].index(heading) < words["index"].index("How far to trust")
        shown = "−0.600 (−0.700 to −0.500)" if r < 0 else "0.600 (0.500 to 0.700)"
        assert f"R of all maps with people is {shown}" in words["model"]
        assert ("Larger numbers of the matrix must mean more alike" in words["model"]) == (r < 0)
        assert ("Only what adds to R², here of a disagreement" in words["trust"]) == (r < 0 and level == "collective")


def words_of(site: Path, run: str, *keys: str) -> dict[str, str]:
    """What the pages of a run say."""
    report(run, site, *keys)
    return {page.stem: text_of(page) for page in site.glob("*.html")}


@pytest.mark.parametrize(
    ("objective", "adds", "takes", "ranking"),
    [
        (None, "raises the score", "lowers the score", ""),
        ("prediction", "raises the score on average", "lowers the score on average", "may do the opposite"),
        (
            "error",
            "brings predictions nearer to the ratings",
            "takes predictions away from the ratings",
            "measured over 40 images (objective error): it is about errors",
        ),
        (
            "similarity",
            "adds to the agreement with people",
            "takes from the agreement with people",
            "neither the head nor the score has a part in it",
        ),
        ("lost", "has positive importance", "has negative importance", "the bundle that the run was made with was not"),
    ],
)
def test_colours_mean_what_the_importance_was_measured_by(
    tmp_path: Path, objective: str | None, adds: str, takes: str, ranking: str
) -> None:
    uris = [str(path) for path in write_images(tmp_path / "photos", ["a.png", "b.png"])]
    digest, keys = None, []
    if objective:
        bundle = report_site.write_importance(tmp_path / "importance", objective)
        digest = report_site.importance_digest(bundle) if objective != "lost" else "c" * 64
        keys = [f"importance=[{bundle}]"] if objective != "lost" else []
    run = write_run(tmp_path / "positive", uris, [2.0, 1.0], importance=digest)
    positive = words_of(tmp_path / "positive-site", run, *keys)
    assert f"Only what {adds} is shown" in positive["index"]
    assert ("One importance of the maps for all images" in positive["index"]) == bool(objective)
    assert ranking in positive["trust"]
    run = write_run(tmp_path / "signed", uris, [2.0, 1.0], importance=digest, weighting="signed")
    signed = words_of(tmp_path / "signed-site", run, *keys)
    assert f"{takes} · none · {adds}" in signed["images"]
    said = " ".join([*positive.values(), *signed.values()])
    assert ("evidence for the score" in said) == (objective is None)
    for words in ("raises the score", "lowers the score"):
        assert (words in said) == (objective in (None, "prediction"))
    assert ("Each heatmap of this run is weighted by its own" in positive["model"]) == (objective is None)
    meaning = meaning_of(open_sources(parse_config(ReportConfig, "", [f"run={run}", f"output={tmp_path}/o", *keys])))
    assert meaning.blue == (f", of maps that {meaning.take}" if objective else " and lowers the score")


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"held_out": True, "measured_on": "images of the head's test split"}, ""),
        ({"held_out": False, "measured_on": "images that it was fitted to"}, "images that it was fitted to"),
        ({"held_out": None}, "images that the head may have been fitted to"),  # as before it was asked
    ],
)
def test_a_ranking_on_images_that_the_head_has_seen_is_marked(tmp_path: Path, details: dict, said: str) -> None:
    paths = write_images(tmp_path / "photos", ["a.png"])
    bundle = report_site.write_importance(tmp_path / "importance", "error", **details)
    run = write_run(tmp_path, [str(paths[0])], [1.0], importance=report_site.importance_digest(bundle))
    report(run, tmp_path / "site", f"importance=[{bundle}]")
    model, trust = (text_of(tmp_path / "site" / f"{name}.html") for name in ("model", "trust"))
    assert ("fitted to" in model + trust) == bool(said)
    assert f"It was measured on {said}." in model or not said
    assert f"The maps were ranked on {said}" in trust or not said
    # A ranking that has nothing to do with the heatmaps is marked where it is shown.
    other = write_run(tmp_path / "other", [str(paths[0])], [1.0], importance="c" * 64)
    report(other, tmp_path / "without", f"importance=[{bundle}]")
    assert "The maps were ranked on" not in text_of(tmp_path / "without" / "trust.html")
    assert said in text_of(tmp_path / "without" / "model.html")


def test_the_head_of_the_run_is_found_and_its_loss_is_noted(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", ["a.png"])
    head = report_site.write_head(tmp_path / "head")
    run = write_run(tmp_path, [str(paths[0])], [1.0], config_yaml=f"head: {head}\nimportance: {tmp_path}/gone\n")
    sources = open_sources(parse_config(ReportConfig, "", [f"run={run}", f"output={tmp_path}/site"]))
    assert sources.head is not None
    assert "the importance that the run was made with" in sources.notes[0]
    assert "left out" in sources.describe()


@pytest.mark.parametrize("name", ["metrics.json", "predictions.parquet", "history.parquet"])
def test_a_damaged_head_of_the_run_is_noted(tmp_path: Path, name: str) -> None:
    paths = write_images(tmp_path / "photos", ["a.png"])
    head = report_site.write_head(tmp_path / "head")
    run = write_run(tmp_path, [str(paths[0])], [1.0], config_yaml=f"head: {head}\n")
    for content in (b"{", (tmp_path / "head" / name).read_bytes()[:-9]):
        (tmp_path / "head" / name).write_bytes(content)
        sources = open_sources(parse_config(ReportConfig, "", [f"run={run}", f"output={tmp_path}/site"]))
        assert sources.head is None
        assert "the head that the run was made with: head: " in sources.notes[0]
    (tmp_path / "head" / name).unlink()
    (tmp_path / "head" / name).mkdir()
    sources = open_sources(parse_config(ReportConfig, "", [f"run={run}", f"output={tmp_path}/site"]))
    assert "cannot be read: IsADirectoryError" in sources.notes[0]


def test_damaged_errors_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, [], [], failures=[("/i/a.png", "decode", "truncated")])
    [shard] = (Path(run) / "errors").iterdir()
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"errors/.*parquet' cannot be read: .*repair=true"):
        report(run, tmp_path / "site")


def test_a_run_of_scores_only_has_no_report(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", ["a.png"])
    run = write_run(tmp_path, [str(paths[0])], [1.0])
    record = json.loads((Path(run) / "run.json").read_text())
    del record["identity"]["weighting"]
    (Path(run) / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="holds scores and no heatmaps; give a run of jobs"):
        report(run, tmp_path / "site")


def test_the_job_starts_fast_and_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_images(tmp_path / "photos", ["a.png"])
    run = write_run(tmp_path, [str(paths[0])], [1.0])
    assert main([f"run={run}", f"output={tmp_path}/site", "--dry-run"]) == 0
    assert "page_bytes: 8000000" in capsys.readouterr().out
    assert not (tmp_path / "site").exists()
    code = f"""
import sys
from jobs.report import main
assert main(["run={run}", "output={tmp_path}/site"]) == 0
print(sorted({{"ray", "torch", "scipy", "s3fs"}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out.strip().endswith("[]")
    assert f"open        {tmp_path}/site/index.html" in out


@pytest.fixture(scope="module")
def script() -> MiniRacer:
    """The script of the pages, in V8 without a document."""
    engine = MiniRacer()
    engine.eval((files("ais.report") / "static" / "report.js").read_text())
    engine.eval(
        """const facts = [
             {id: 3, score: 2.5, spread: null, uri: "/Photos/Cat.png", choices: ["highest"]},
             {id: 12, score: -1, spread: 0.3, uri: "s3://b/dog 12.png", choices: []},
             {id: 1, score: 2.5, spread: 0.1, uri: "/x/<b>.png", choices: ["highest", "near 2.5"]}];
           const ids = (...query) => facts.filter((f) => gallery.fits(f, gallery.query(...query))).map((f) => f.id);"""
    )
    return engine


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ('"", "", "", ""', [3, 12, 1]),
        ('"", "2.5", "", ""', [3, 1]),
        ('"", "", "2.49", ""', [12]),
        ('"", "3", "2", ""', []),
        ('"", "x", " ", ""', [3, 12, 1]),
        ('" CAT ", "", "", ""', [3]),
        ('"12", "", "", ""', [12]),
        ('"<B>", "", "", ""', [1]),
        ('".*", "", "", ""', []),
        ('"", "", "", "near 2.5"', [1]),
        ('"png", "0", "5", "highest"', [3, 1]),
    ],
)
def test_the_filter(script: MiniRacer, query: str, ids: list[int]) -> None:
    assert json.loads(script.eval(f"JSON.stringify(ids({query}))")) == ids


def test_order_steps_and_counts(script: MiniRacer) -> None:
    orders = {"high": [1, 3, 12], "low": [12, 1, 3], "spread": [12, 1, 3], "id": [1, 3, 12], "nonsense": [1, 3, 12]}
    for order, ids in orders.items():
        assert json.loads(script.eval(f"JSON.stringify(gallery.ordered(facts, '{order}').map((f) => f.id))")) == ids
    steps = {"-1, 1, 5": 0, "-1, -1, 5": 4, "4, 1, 5": 4, "0, -1, 5": 0, "2, 1, 5": 3}
    assert {args: script.eval(f"gallery.step({args})") for args in steps} == steps
    assert script.eval("gallery.counted(1, 1)") == "1 image"
    assert script.eval("gallery.counted(1200, 3400)") == "1,200 of 3,400 images"


def test_the_style_sheet_reaches_nowhere() -> None:
    style = (files("ais.report") / "static" / "report.css").read_text()
    assert not re.findall(r"url\(|@import|@font-face", style)
    defined, used = set(re.findall(r"(--[a-z-]+):", style)), set(re.findall(r"var\((--[a-z-]+)\)", style))
    assert used <= defined
