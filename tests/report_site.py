"""A small run folder with real images, and everything that a report can show of it, as `ais` writes it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from ais.comparison.report import METRICS
from ais.config import ReportConfig
from ais.images import Geometry
from ais.importance import ImportanceRecord, save_importance
from ais.listing import ListedImage, look_up
from ais.report import Report, open_sources, write_report
from ais.runs import ERRORS_SCHEMA, Run, results_schema, write_table
from ais.settings import parse_config
from ais.storage import Storage

HEAD = "a" * 64
WEIGHTS = "b" * 64
CENTER_CROP = Geometry(224, 256, "bilinear")
SIZES = [(96, 96), (150, 100), (80, 200), (120, 90), (64, 128)]  # width, height
HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "</script><script>document.title='owned'</script>.png",
    '"onmouseover="alert(1)" a="{{ 7*7 }}.png',
    "javascript:alert(1).png",
    "a" * 180 + ".png",
    "\u202egnp.exe.png",
    "two\nlines & ünïcode 画像.png",
]


def write_images(folder: Path, names: Sequence[str], seed: int = 0) -> list[Path]:
    """Write small photographs of noise."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, name in enumerate(names):
        width, height = SIZES[index % len(SIZES)]
        coarse = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        path = folder / name.replace("/", "∕")
        Image.fromarray(coarse).resize((width, height)).save(path)
        paths.append(path)
    return paths


def write_run(
    place: Path | str,
    uris: Sequence[str],
    scores: Sequence[float],
    *,
    run_id: str = "photos",
    spreads: Sequence[float | None] | None = None,
    failures: Sequence[tuple[str, str, str]] = (),
    weighting: str = "positive",
    complete: bool = True,
    untrained: bool = True,
    shard_rows: int = 4,
    shape: tuple[int, int] = (7, 7),
    config_yaml: str = "",
    importance: str | None = None,
    storage: Storage = Storage(),  # noqa: B008 - frozen
) -> str:
    """Write a run folder; image i has the size ``SIZES[i % 5]``. Returns its address."""
    run = Run.at(str(place), run_id, storage)
    facts = {
        "run_id": run_id,
        "identity": {"weighting": weighting, "head": HEAD, "importance": importance, "images": "/photos"},
        "backbone": "tiny",
        "layer": {"name": "features.8", "map_shape": [16, *shape]},
        "weights": {"source": "random", "fingerprint": WEIGHTS, "seed": 3, "licence": None},
        "untrained": untrained,
        "versions": {"ais": "0.1.0"},
    }
    listed = [look_up(uri, storage) for uri in [*uris, *(uri for uri, _, _ in failures)]]
    run.set_out(listed or [ListedImage("/i/none.png")], config_yaml, facts)
    for start in range(0, len(uris), shard_rows):
        part = slice(start, start + shard_rows)
        rows = len(uris[part])
        sizes = [SIZES[(start + row) % len(SIZES)] for row in range(rows)]
        boxes = np.stack([CENTER_CROP.apply(np.zeros((h, w, 3), np.uint8))[1] for w, h in sizes])
        heatmaps = heatmaps_of(range(start, start + rows), shape, weighting)
        columns = {
            "image_id": pa.array(np.arange(start, start + rows)),
            "uri": list(uris[part]),
            "etag": pa.array([image.etag for image in listed[part]][:rows], pa.string()),
            "width": pa.array([w for w, _ in sizes], pa.int32()),
            "height": pa.array([h for _, h in sizes], pa.int32()),
            "box": pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
            "heatmap_box": pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
            "score": pa.array(np.asarray(scores[part], np.float32)),
            "score_std": pa.array(spreads[part] if spreads else [None] * rows, pa.float32()),
            "heatmap": pa.FixedShapeTensorArray.from_numpy_ndarray(heatmaps),
            "png": pa.nulls(rows, pa.string()),
        }
        write_table(run.results / f"part-{start:05d}.parquet", pa.table(columns, schema=results_schema(shape)))
    if failures:
        rows = [
            {"image_id": len(uris) + i, "uri": uri, "etag": None, "stage": "decode", "reason": reason, "error": error}
            for i, (uri, reason, error) in enumerate(failures)
        ]
        write_table(run.errors / "part-00000.parquet", pa.Table.from_pylist(rows, schema=ERRORS_SCHEMA))
    if complete:
        run.finish({**facts, "finished_at": "2026-11-25T01:00:00+00:00", "images": len(listed)})
    return run.folder.address


def heatmaps_of(ids: Sequence[int] | range, shape: tuple[int, int], weighting: str) -> np.ndarray:
    """A blob that moves with the image; the sixth is zero everywhere, signed ones have a negative corner."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    maps = []
    for index in ids:
        centre = (index * 2) % shape[0], (index * 3) % shape[1]
        blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 3)
        if weighting == "signed":
            blob[-1, -1] = -0.7
        maps.append(np.zeros(shape) if index == 5 else blob)
    return np.stack(maps).astype(np.float32)


def write_head(folder: Path, heads: int = 1, tests: int = 30) -> str:
    """Write what a report reads of a head bundle."""
    random, place = np.random.default_rng(1), Storage().open(str(folder))
    plcc = {"value": 0.93, "low": 0.88, "high": 0.97, "n": tests}
    split = {"n": tests, **dict.fromkeys(("PLCC", "SRCC", "KRCC", "RMSE"), plcc)}
    metrics = {"test": split, "validation": {"n": 2, "undefined": "2 images are too few"}}
    metrics["variants"] = [{"best_epoch": 20}] * heads
    rated = random.uniform(1, 5, tests)
    write_table(
        place / "predictions.parquet",
        pa.table({"image": ["x"] * tests, "score": rated, "predicted": rated + random.normal(0, 0.3, tests)}),
    )
    epochs = np.arange(1, 31)
    write_table(
        place / "history.parquet",
        pa.table(
            {
                "variant": np.repeat(np.arange(heads), 30),
                "epoch": np.tile(epochs, heads),
                "train_rmse": np.tile(2 / epochs, heads),
                "validation_rmse": np.tile(0.4 + 2 / epochs, heads),
            }
        ),
    )
    (place / "metrics.json").write_text(json.dumps(metrics))
    (place / "head.json").write_text(json.dumps({"format": 1, "sha256": HEAD, "variants": heads}))
    return str(folder)


def write_importance(folder: Path, objective: str = "error", maps: int = 16, **details: object) -> str:
    """Write an importance bundle of the run's backbone and layer, whose `importance_digest` is that of its table."""
    ais = np.linspace(3, -1, maps)
    table = pa.table({"map": np.arange(maps), "ais": ais, "rank": np.arange(1, maps + 1)})
    table = table.append_column("ais_low", pa.array(ais - 0.2)).append_column("ais_high", pa.array(ais + 0.2))
    record = ImportanceRecord(objective, "tiny", WEIGHTS, "features.8", "center_crop", HEAD)
    said = {"images": 40, "sign": "mean of |s_k - y| - |s - y|", "held_out": True}
    save_importance(str(folder), table, record, said | details, Storage())
    return str(folder)


def importance_digest(folder: str) -> str:
    """What a run that was made with a bundle names it by."""
    return json.loads((Path(folder) / "importance.json").read_text())["sha256"]


def write_validation(folder: Path, conclusion: str, weighting: str = "positive") -> str:
    """Write what a report reads of a validation."""
    place = Storage().open(str(folder))
    checks = [
        {
            "name": "a",
            "claim": "the head predicts",
            "outcome": "shown",
            "value": 0.9,
            "low": 0.8,
            "high": 0.95,
            "n": 30,
        },
        {
            "name": "b",
            "claim": "beats <b>chance</b>",
            "outcome": "not shown",
            "value": 0.0,
            "low": -0.1,
            "high": 0.1,
            "n": 9,
        },
        {"name": "c", "claim": "nothing", "outcome": "not measured", "value": None, "low": None, "high": None, "n": 0},
    ]
    maps = np.arange(0, 17)
    curves = [
        {"measure": "PLCC", "order": order, "maps": int(k), "test": gain * (1 - 0.7**k)}
        for order, gain in (("ais", 0.9), ("random", 0.6))
        for k in maps
    ]
    deletion = [
        {"fill": "blurred", "mode": mode, "method": method, "share": share, "score": 4 - share * fall}
        for mode in ("deletion", "insertion")
        for method, fall in (("ais", 3), ("random", 2))
        for share in (0.0, 0.5, 1.0)
    ]
    write_table(place / "curves.parquet", pa.Table.from_pylist(curves))
    write_table(place / "deletion.parquet", pa.Table.from_pylist(deletion))
    record = {
        "conclusion": conclusion,
        "checks": checks,
        "images": {"rated": 30, "curved": 9},
        "protocol_refused": None,
        "weighting": weighting,
        "heatmaps": {
            "random_head_correlation": {
                "positive": {"value": 0.995, "low": 0.99, "high": 0.998, "n": 9},
                "signed": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 9},
            },
            "variant_correlation": {"positive": {"value": None, "low": None, "high": None, "n": 0}},
            "plain_correlation": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 9},
            "pointing": {"ais": {"hit_rate": {"value": 0.95, "low": 0.9, "high": 1.0, "n": 9}, "chance": 0.09}},
        },
        "head": HEAD,
        "layer": "features.8",
    }
    (place / "validation.json").write_text(json.dumps(record))
    return str(folder)


def write_comparison(folder: Path, names: Sequence[str]) -> str:
    """Write what a report reads of a comparison."""
    place = Storage().open(str(folder))
    rows = [
        {
            "metric": metric,
            "run_a": a,
            "run_b": b,
            "mean": 0.4 - 0.1 * i,
            "low": 0.3,
            "high": 0.5,
            "n": 20,
            "undefined": 0,
        }
        for metric in METRICS
        for i, (a, b) in enumerate((a, b) for a in names for b in names if a != b)
    ]
    write_table(place / "matrices.parquet", pa.Table.from_pylist(rows))
    record = {"runs": [{"name": name} for name in names], "metrics": METRICS, "pairs": []}
    (place / "summary.json").write_text(json.dumps(record))
    return str(folder)


def everything(place: Path, *, weighting: str = "positive") -> tuple[str, list[str]]:
    """A run with hostile names, a lost image and errors, and all that goes with it: its address and the keys."""
    names = [*HOSTILE, *(f"photo-{index:03d}.png" for index in range(33))]
    paths = write_images(place / "photos", names)
    paths[9].unlink()
    Image.new("RGB", (7, 5)).save(paths[10])
    scores = np.linspace(4.8, 1.2, len(paths)).tolist()
    failures = [
        (
            f"/lost/<b>{number}</b>.png",
            "truncated" if number % 3 else "not an <i>image</i>",
            "JPEG: <script>alert(1)</script>",
        )
        for number in range(12)
    ]
    run = write_run(
        place,
        [str(path) for path in paths],
        scores,
        spreads=[0.1 + index % 7 / 50 for index in range(len(paths))],
        failures=failures,
        weighting=weighting,
    )
    keys = [
        f"head={write_head(place / 'head', 2)}",
        f"importance=[{write_importance(place / 'importance')}]",
        f"validation={write_validation(place / 'validation', 'PASSED IN PART: it was not shown that <b>x</b>.')}",
        f"comparison={write_comparison(place / 'comparison', ['one', 'two <b>', 'a very long name of a third run'])}",
    ]
    return run, keys


def report(run: str, output: Path | str, *keys: str) -> Report:
    """Make a report of a run."""
    config = parse_config(ReportConfig, "", [f"run={run}", f"output={output}", *keys])
    return write_report(open_sources(config))


def digest_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def picture(data: bytes) -> np.ndarray:
    """Pixels of a file."""
    return np.asarray(Image.open(io.BytesIO(data)))
