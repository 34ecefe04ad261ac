"""`jobs/heatmaps.py` against a loop written by hand that does the same on the same cores.

The loop opens each file with Pillow, brings it to the input of the network, and explains batch after batch on all
cores: what one would write in an hour, without errors, shards, resuming or pictures (with ``overlay`` it draws them).
Both start anew for every pair. Of the job the steady state counts, from the first finished batch to the last (with
pictures: until everything is drawn and written); its start-up is stated beside it. What the job's fetching has decoded
before that moment is charged to it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ais import Explainer, RegressionHead, load_backbone, load_head
from ais.backbones import BackboneSpec
from ais.heads import HeadEnsemble, save_head
from ais.heatmaps import HeatmapCells, normalise_for_display, place_on_image
from ais.render import fit_within, overlay_png
from tests.benchmarks.processes import Watched
from tests.benchmarks.tables import grid, paragraph, show
from tests.benchmarks.timing import Ratio

BACKBONE = "barlow_twins"
IMAGES = 240
BATCH = 16
PAIRS = 5
SIZE = (640, 480)
KINDS = {"driver": "driver", "fetch": "fetch and decode", "score": "score and explain", "ray": "draw, write, Ray"}


def make_photographs(folder: Path, count: int, size: tuple[int, int] = SIZE) -> None:
    """JPEG files with the frequencies of photographs: noise that falls off as 1/f^1 to 1/f^1.6, in many colours."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / width)
    for index in range(count):
        rng = np.random.default_rng(index)
        falloff = frequency ** -rng.uniform(1.0, 1.6)
        planes = []
        for _ in range(3):
            spectrum = np.fft.rfft2(rng.normal(size=(height, width))) * falloff
            plane = np.fft.irfft2(spectrum, s=(height, width))
            planes.append(rng.uniform(70, 180) + rng.uniform(15, 60) * plane / plane.std())
        pixels = np.clip(np.stack(planes, 2), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.jpg", quality=90)


def make_head(folder: Path, backbone: str | BackboneSpec) -> None:
    """A head that nobody fitted; speed does not depend on it."""
    network = load_backbone(backbone, weights="random", seed=0)
    torch.manual_seed(0)
    save_head(str(folder), HeadEnsemble([RegressionHead(network.embedding_size)]), network, "center_crop", {})


def loop(images: Path, head: Path, pictures: bool) -> dict[str, float]:
    """The loop; run in a process of its own."""
    explainer = Explainer(load_backbone(BACKBONE, weights="random", seed=0), load_head(str(head)))
    layer = explainer.backbone.layer
    assert layer is not None
    cells = HeatmapCells((layer.map_shape[1], layer.map_shape[2]), layer.extent, explainer.backbone.spec.input_size)
    files = sorted(images.iterdir())
    decode_s = started = started_cpu = 0.0
    for start in range(0, len(files), BATCH):
        if start == BATCH:  # the first batch warms up
            started, started_cpu, decode_s = time.perf_counter(), time.process_time(), 0.0
        before = time.process_time()
        originals = []
        for file in files[start : start + BATCH]:
            with Image.open(file) as image:
                originals.append(np.asarray(image.convert("RGB")))
        prepared = [explainer.geometry.apply(original) for original in originals]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in prepared]))
        boxes = np.stack([box for _, box in prepared])
        decode_s += time.process_time() - before
        result = explainer.explain_pixels(pixels, torch.from_numpy(boxes))
        if pictures:
            for original, heatmap, box, seen in zip(
                originals, result.heatmaps.numpy(), cells.on_originals(boxes), boxes, strict=True
            ):
                shown = fit_within(original, 512)
                placed = place_on_image(heatmap, box, original.shape[:2], shown.shape[:2], seen=seen)
                overlay_png(shown, normalise_for_display(placed, "positive"), "positive", {})
    count = len(files) - BATCH
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    return {"per_s": count / seconds, "decode_s_per_image": decode_s / count, "cpu_s_per_image": cpu_s / count}


def job(images: Path, head: Path, output: Path, pictures: bool, environment: dict[str, str]) -> dict[str, Any]:
    """The job, watched from outside."""
    command = [
        "jobs/heatmaps.py",
        f"images={images}",
        f"head={head}",
        f"output={output}",
        f"png.select={'all' if pictures else 'none'}",
        f"compute.batch_size={BATCH}",
    ]
    with Watched(command, environment) as watched:
        watched.wait()
    (summary_file,) = output.glob("runs/*/summary.json")
    summary = json.loads(summary_file.read_text())
    start = summary["last_start"]
    # The summary is the last that is written; Ray's farewell comes after it.
    ended_s = summary_file.stat().st_mtime - watched.started
    first_s = ended_s - start["pipeline_s"] + start["first_batch_s"]
    first = watched.at(watched.started + first_s)
    last = watched.seen[-1]
    count = start["images"] - BATCH
    drawn_per_s = count / (start["pipeline_s"] - start["first_batch_s"])
    return {
        "per_s": drawn_per_s if pictures else start["steady_images_per_s"],
        "images": start["images"],
        "first_batch_s": first_s,
        "start": {
            "imports": ended_s - start["wall_s"],
            "checks, listing, Ray": start["wall_s"] - start["pipeline_s"],
            "workers, their imports and models, first batch": start["first_batch_s"],
        },
        "stage_s": start["stage_s"],
        "fetch_cpu_s": (first.cpu_s["fetch"], last.cpu_s["fetch"]),
        "steady_cpu_s": {kind: last.cpu_s[kind] - first.cpu_s[kind] for kind in last.cpu_s},
        "start_cpu_s": dict(first.cpu_s),
        "peak_bytes": max(sum(look.bytes.values()) for look in watched.seen),
    }


def ahead_s(job: dict[str, Any], decode_s: float) -> float:
    """Processor seconds that the job had spent on decoding when its first batch was finished.

    What the fetching process used beyond decoding all images is its own start.
    """
    first, last = job["fetch_cpu_s"]
    return max(0.0, first - max(0.0, last - decode_s * job["images"]))


def charged(job: dict[str, Any], decode_s: float, cores: int) -> float:
    """Images a second of the job with the decoding done before the first batch charged to it."""
    count = job["images"] - BATCH
    return count / (count / job["per_s"] + ahead_s(job, decode_s) / cores)


def measure(pictures: bool, folder: Path, pairs: int = PAIRS) -> dict[str, Any]:
    """Loop and job in turn."""
    environment = {**os.environ, "RAY_TMPDIR": str(folder / "r")}
    environment.pop("OMP_NUM_THREADS", None)
    environment["RAY_worker_niceness"] = "0"  # as the loop runs, which other work would not slow down as much
    images, head = folder / "images", folder / "head"
    cores = os.cpu_count() or 1
    loops, jobs, ratios, cpu_ratios = [], [], [], []
    for pair in range(pairs):
        arguments = ["-m", "tests.benchmarks.job_against_loop", str(images), str(head), str(int(pictures))]
        with Watched(arguments, environment) as watched:
            loops.append(json.loads(watched.wait().splitlines()[-1]))
        output = folder / f"out-{int(pictures)}-{pair}"
        jobs.append(job(images, head, output, pictures, environment))
        ratios.append(charged(jobs[-1], loops[-1]["decode_s_per_image"], cores) / loops[-1]["per_s"])
        count = jobs[-1]["images"] - BATCH
        jobs[-1]["steady_cpu_s"]["fetch"] += ahead_s(jobs[-1], loops[-1]["decode_s_per_image"])
        used_s = sum(jobs[-1]["steady_cpu_s"].values())
        cpu_ratios.append(loops[-1]["cpu_s_per_image"] * count / used_s)
        shutil.rmtree(output)
    median = statistics.median
    kinds = sorted({kind for job in jobs for kind in job["steady_cpu_s"]})
    count = jobs[0]["images"] - BATCH
    ratio = Ratio(
        median(ratios), min(ratios), max(ratios), median(j["per_s"] for j in jobs), median(x["per_s"] for x in loops)
    )
    return {
        "backbone": BACKBONE,
        "pictures": "an overlay for every image" if pictures else "none",
        "images": jobs[0]["images"],
        "job_over_loop": ratio.as_dict(),
        "loop_cpu_over_job_cpu": {
            "median": round(median(cpu_ratios), 3),
            "low": round(min(cpu_ratios), 3),
            "high": round(max(cpu_ratios), 3),
        },
        "job_images_per_s": round(median(j["per_s"] for j in jobs), 2),
        "loop_images_per_s": round(median(x["per_s"] for x in loops), 2),
        "first_result_s": round(median(j["first_batch_s"] for j in jobs), 1),
        "start_s": {part: round(median(j["start"][part] for j in jobs), 1) for part in jobs[0]["start"]},
        "start_cpu_s": {kind: round(median(j["start_cpu_s"].get(kind, 0) for j in jobs), 2) for kind in kinds},
        "cpu_ms_per_image": {
            kind: round(1000 * median(j["steady_cpu_s"].get(kind, 0) for j in jobs) / count, 2) for kind in kinds
        },
        "loop_decode_ms_per_image": round(1000 * median(x["decode_s_per_image"] for x in loops), 2),
        "peak_MiB": round(median(j["peak_bytes"] for j in jobs) / 2**20),
    }


def rows(pairs: int = PAIRS) -> list[dict[str, Any]]:
    """Measure without and with pictures."""
    folder = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))  # Ray's sockets lie below it: the path has to be short
    try:
        make_photographs(folder / "images", IMAGES)
        make_head(folder / "head", BACKBONE)
        return [measure(pictures, folder, pairs) for pictures in (False, True)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    starts = ", ".join(f"{part} {seconds:g}" for part, seconds in rows[0]["start_s"].items())
    text = f"""
        **The job over a loop written by hand** that decodes and explains the same {rows[0]["images"]} JPEG files of
        {SIZE[0]}×{SIZE[1]} with the same model on the same cores; steady state, and beside it the seconds from the
        command to the first finished batch ({starts}). *In processor time*: what the loop uses for an image over what
        all processes of the job use, which other work on the machine disturbs less. The last columns: where it goes,
        in processor milliseconds an image; of the loop, {rows[0]["loop_decode_ms_per_image"]:g} are decoding.
        """
    cells = [
        (
            row["pictures"],
            show(row["job_over_loop"]),
            show(row["loop_cpu_over_job_cpu"]),
            row["job_images_per_s"],
            row["loop_images_per_s"],
            row["first_result_s"],
            *(round(row["cpu_ms_per_image"].get(kind, 0), 1) for kind in KINDS),
        )
        for row in rows
    ]
    header = (
        "pictures",
        "job ÷ loop",
        "the same in processor time",
        "job, images/s",
        "loop, images/s",
        "first batch after, s",
    )
    return paragraph(text) + "\n" + grid((*header, *KINDS.values()), cells)


if __name__ == "__main__":
    print(json.dumps(loop(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1")))
