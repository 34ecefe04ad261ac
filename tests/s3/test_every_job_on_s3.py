"""Every job in a row with every address on S3, while requests fail; nothing of it touches this machine's files.

What is faked is AWS, by moto (`tests.s3.server`), and the network's faults, by `tests.s3.proxy`. The backbone is a tiny
one with random weights.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import compare, convert, heatmaps, importance, report, score, train, validate
from tests import tiny  # noqa: F401 - registers the backbone
from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import SECRET_KEY, S3Server

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    # Ray's own context copies its deprecated settings.
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray"),
]
IMAGES = 60


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def rated_images(s3: S3Server, folder: str) -> None:
    """Grey images with a bright square whose brightness is the rating, a mask of it each, and people's similarities."""
    rng = np.random.default_rng(0)
    lines, ratings = ["picture,beauty"], rng.uniform(0, 1, IMAGES)
    for number, rating in enumerate(ratings):
        inside = np.zeros((48, 48), bool)
        left, top = rng.integers(4, 24, 2)
        inside[top : top + 20, left : left + 20] = True
        pixels = np.where(inside, 120 + 130 * rating, 100) + rng.normal(0, 6, (48, 48))
        s3.put(f"{folder}/rated/{number:02d} ü.png", png(np.stack([pixels.clip(0, 255).astype(np.uint8)] * 3, -1)))
        s3.put(f"{folder}/masks/{number:02d} ü.png", png(inside.astype(np.uint8) * 255))
        lines.append(f"rated/{number:02d} ü.png,{rating:.4f}")
    s3.put(f"{folder}/ratings.csv", "\n".join(lines).encode())
    matrix = io.BytesIO()
    np.save(matrix, -np.abs(ratings[:20, None] - ratings[None, :20]))
    s3.put(f"{folder}/human.npy", matrix.getvalue())
    listed = "\n".join(["uri", *(f"{folder}/rated/{number:02d} ü.png" for number in range(20))])
    s3.put(f"{folder}/compared.csv", listed.encode())


def test_every_job(bucket: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rated_images(s3, bucket)
    published = "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set\n"
    published += "".join(f"{number:02d} ü.png,0,0,0,0,0,9,{50 + number},1,training\n" for number in range(12))
    s3.put(f"{bucket}/koniq10k/koniq10k_distributions_sets.csv", published.encode())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    proxy = FaultyProxy(s3.endpoint_url, Faults.each(0.02), seed=5)
    at = f"storage.endpoint_url={proxy.endpoint_url}"
    table = [f"ratings.path={bucket}/ratings.csv", "ratings.image_column=picture", "ratings.score_column=beauty"]
    first = f"head={bucket}/heads/first"
    with proxy:
        untrained = ["backbone.name=tiny", "backbone.weights=random", "backbone.seed=3"]
        fit = ["fit.test_share=0.5", "fit.epochs=60", "fit.checkpoint_every=20", "fit.learning_rate=0.02"]
        fit += ["head.hidden=16"]
        converted = [f"source={bucket}/koniq10k", f"images={bucket}/rated", f"output={bucket}/converted.csv"]
        runs = [f"images={bucket}/rated", f"output={bucket}/out", first]
        checks = [f"masks={bucket}/masks", "folds=3", "seeds=2", "images_limit=8", "steps=2", "fill=mean"]
        pages = [f"importance=[{bucket}/importance]", f"validation={bucket}/validation", f"comparison={bucket}/agree"]
        compared = [f"matrix={bucket}/human.npy", f"images={bucket}/compared.csv"]
        for job, arguments in (
            (convert, ["dataset=koniq10k", *converted]),
            (train, [*table, f"output={bucket}/heads/first", *untrained, *fit]),
            (importance, ["objective=error", *table, first, f"output={bucket}/importance"]),
            (importance, ["objective=similarity", *compared, *untrained, f"output={bucket}/similarity"]),
            (heatmaps, [*runs, "run_id=own"]),
            (heatmaps, [*runs, "run_id=ranked", f"importance={bucket}/importance"]),
            (heatmaps, [*runs, "run_id=ranked", f"importance={bucket}/importance", "verify=true"]),
            (score, [f"images={bucket}/rated", f"output={bucket}/scores", first, "tick=one"]),
            (compare, [f"runs=[{bucket}/out/runs/own,{bucket}/out/runs/ranked]", f"output={bucket}/agree"]),
            (validate, [*table, first, *checks, f"output={bucket}/validation"]),
            (
                validate,
                ["objective=similarity", *compared, *untrained, "folds=3", "seeds=1", f"output={bucket}/judged"],
            ),
            (report, [f"run={bucket}/out/runs/ranked", f"output={bucket}/pages", *pages]),
        ):
            assert job.main([*arguments, at]) == 0, f"{job.__name__} {arguments}"
        assert sum(count for fault, count in proxy.counts().items() if fault != "requests") > 10
    keys = set(s3.keys(bucket))
    assert any(key.startswith("heads/embeddings/") for key in keys)
    assert not [key for key in keys if "/.train/" in key], "checkpoints are there only until the bundle is"
    for key in (
        *("converted.csv", "heads/first/head.json", "importance/importance.parquet", "similarity/importance.png"),
        *(
            "out/runs/own/summary.json",
            "out/runs/ranked/summary.json",
            "scores/latest.parquet",
            "agree/matrices.parquet",
        ),
        *("validation/verdict.txt", "validation/validation.json", "judged/validation.json", "pages/index.html"),
    ):
        assert key in keys, f"{key} of {sorted(keys)}"
    assert json.loads(s3.get(f"{bucket}/out/runs/ranked/summary.json"))["scored"] == IMAGES
    assert s3.get(f"{bucket}/converted.csv").decode().count("ü.png") == 12
    assert not [key for key in keys if SECRET_KEY.encode() in s3.get(f"{bucket}/{key}")]
    assert not list(here.iterdir()), "everything is on S3"
