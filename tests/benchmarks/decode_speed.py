"""Images a second of one core, from the bytes of a JPEG to the input of a network: ours, torchvision's and Pillow's.

One thread, processor seconds, the same files from memory. *torchvision*: `decode_jpeg`, `Resize`, `CenterCrop` on
tensors. *Pillow*: decode, convert, and torchvision's transforms on the PIL image, as its presets document. *Isolated*:
ours in a child process (`ais.decoding`), what the jobs use; processor seconds of both sides of the pipe.

What scaled decoding does to scores and effects is measured with an untrained ResNet-50 and an untrained head: the
largest and the mean difference, in standard deviations of the scores over the images, and for the effects relative to
the largest effect of the image.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from ais import Explainer, RegressionHead, load_backbone
from ais.decoding import DecoderPool, Decoding
from ais.images import Limits
from tests.benchmarks.job_against_loop import make_photographs
from tests.benchmarks.tables import grid, paragraph, show
from tests.benchmarks.timing import paired

SIZES = ((640, 480), (2048, 1536))
IMAGES = {(640, 480): 64, (2048, 1536): 16}


def measure(size: tuple[int, int], explainer: Explainer) -> dict[str, Any]:
    """Measure one size of images; returns a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), IMAGES[size], size)
        files = [file.read_bytes() for file in sorted(Path(folder).iterdir())]
    spec, geometry = explainer.backbone.spec, explainer.geometry
    crop = v2.Compose(
        [v2.Resize(spec.resize_size, v2.InterpolationMode(spec.interpolation)), v2.CenterCrop(spec.input_size)]
    )
    ours, scaled = Decoding(geometry, Limits()), Decoding(geometry, Limits(scaled_jpeg=True))
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]

    def all_of(decode: Callable[[Any], object], given: list[Any]) -> Callable[[], None]:
        def run() -> None:
            for one in given:
                decode(one)

        return run

    whole = all_of(ours, files)
    others = {
        "torchvision": all_of(lambda data: crop(decode_jpeg(data, ImageReadMode.RGB)), tensors),
        "Pillow": all_of(lambda data: crop(Image.open(io.BytesIO(data)).convert("RGB")), files),
        "scaled": all_of(scaled, files),
    }
    row: dict[str, Any] = {"size": f"{size[0]}×{size[1]}", "kB": round(sum(map(len, files)) / len(files) / 1000)}
    for name, other in others.items():
        ratio = paired(other, whole)
        row[f"{name}_over_ours"] = ratio.as_dict()
        row["images_per_s"] = round(len(files) / ratio.denominator_s)
    pool = DecoderPool(ours, 1)
    try:
        row["isolated_over_ours"] = paired(all_of(pool.decode, files), whole, clock=_all_cpu_s).as_dict()
    finally:
        pool.close()
    return row | _effect(explainer, [ours(file).pixels for file in files], [scaled(file).pixels for file in files])


def _all_cpu_s() -> float:
    """Processor seconds of this process and its children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children())]
    return sum(time.user + time.system for time in times)


def _effect(explainer: Explainer, whole: list[np.ndarray], scaled: list[np.ndarray]) -> dict[str, float]:
    results = []
    for pixels in (whole, scaled):
        stacked = torch.from_numpy(np.stack(pixels))
        results.append(explainer.explain_pixels(stacked, torch.zeros(len(pixels), 4)))
    expected, found = results
    scores = (found.scores - expected.scores).abs() / expected.scores.std()
    effects = (found.importance - expected.importance).abs().amax(1) / expected.importance.abs().amax(1)
    return {
        "scores_largest": float(f"{scores.max():.2g}"),
        "scores_mean": float(f"{scores.mean():.2g}"),
        "effects_largest": float(f"{effects.max():.2g}"),
    }


def rows() -> list[dict[str, Any]]:
    """Measure every size."""
    backbone = load_backbone("barlow_twins", weights="random", seed=0)
    torch.manual_seed(0)
    explainer = Explainer(backbone, RegressionHead(backbone.embedding_size))
    return [measure(size, explainer) for size in SIZES]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = """
        **Decoding**: from the bytes of a JPEG to the input of a network, one core. Ratios above 1 mean that ours is
        faster. *Scaled*: `limits.scaled_jpeg=true`, off by default; what it does to the scores of an untrained
        ResNet-50, in standard deviations over the images (synthetic, with the frequencies of photographs).
        """
    header = (
        "JPEG", "ours, images/s", "torchvision ÷ ours", "Pillow ÷ ours", "scaled ÷ ours", "in a child process ÷ ours",
        "scores, scaled: mean", "largest",
    )  # fmt: skip
    cells = [
        (
            f"{row['size']}, {row['kB']} kB",
            row["images_per_s"],
            *(show(row[f"{name}_over_ours"]) for name in ("torchvision", "Pillow", "scaled")),
            show(row["isolated_over_ours"]),
            row["scores_mean"],
            row["scores_largest"],
        )
        for row in rows
    ]
    return paragraph(text) + "\n" + grid(header, cells)
