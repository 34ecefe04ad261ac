"""`make gpu-bench`: every backbone at its input size on one device, part by part, and what the device could do at most.

    python -m tests.benchmarks.gpu                          all backbones on the GPU, in float32, bfloat16 and float16
    python -m tests.benchmarks.gpu --device cpu tiny        any backbones on any device, to see that it works

Times are of the median batch, between synchronisations of the device. *Ceiling*: multiply-adds a second of one large
matrix product of the trunk's precision, measured on the same device in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from ais import Explainer, RegressionHead, load_backbone
from ais.ablation import ablated_embeddings, channelwise_effects, replaced_coordinates, run_trunk
from ais.backbones import Backbone, TailKind
from ais.explainer import to_device
from ais.heads import HeadEnsemble
from ais.heatmaps import heatmap_weights, weighted_maps
from tests.benchmarks.floors import work_of
from tests.benchmarks.tables import grid, paragraph

RESULTS = Path(__file__).parent / "results"
BACKBONES = ("resnet152", "barlow_twins", "densenet161", "efficientnet_b3", "vgg16", "vgg19")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = {"cuda": 64, "cpu": 4}
_CEILING_SIDE = {"cuda": 8192, "cpu": 1024}


class Clock:
    """Seconds of the median call, from an idle device to an idle device."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self._device = device
        self._runs = runs

    def __call__(self, function: Callable[[], object]) -> float:
        for _ in range(2):
            function()
        return statistics.median(self.once(function) for _ in range(self._runs))

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        self._wait()
        started = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def ceiling(device: torch.device, dtype: torch.dtype, clock: Clock, side: int | None = None) -> float:
    """Multiply-adds a second of a large matrix product."""
    side = side or _CEILING_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return side**3 / clock(lambda: a @ b)


@torch.inference_mode()
def measure(
    name: str, device: torch.device, dtype: torch.dtype, batch: int, clock: Clock, top: float, *, compile: bool = False
) -> dict[str, Any]:
    """Measure one backbone in one precision; returns a row of the table."""
    backbone = load_backbone(name, weights="random", seed=0, device=device)
    assert backbone.layer is not None
    torch.manual_seed(0)
    explainer = Explainer(backbone, RegressionHead(backbone.embedding_size), trunk_dtype=dtype)
    side = backbone.spec.input_size
    pixels = torch.randint(0, 255, (batch, side, side, 3), dtype=torch.uint8)
    multiply_adds = work_of(backbone.network, backbone.normalise(pixels[:1].to(device))).multiply_adds
    row: dict[str, Any] = {"backbone": name, "layer": backbone.layer.name, "precision": str(dtype).split(".")[1]}
    if compile:
        backbone.compile_trunk()
        row["compile_s"] = clock.once(lambda: explainer.heatmap_pixels(pixels))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole_s = clock(lambda: explainer.heatmap_pixels(pixels))
    row |= {
        "compiled": compile,
        "batch": batch,
        "images_per_pass": explainer.passes.limit or batch,
        "images_per_s": batch / whole_s,
        "batch_s": whole_s,
        "ceiling_share": multiply_adds * batch / whole_s / top,
        "peak_MiB": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
    }
    row["parts_s"] = parts(explainer.backbone, explainer.head, pixels[: row["images_per_pass"]], dtype, clock)
    return row


def parts(backbone: Backbone, head: HeadEnsemble, pixels: Tensor, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """Seconds of each part of a batch, each alone."""
    split, device = backbone.split, backbone.mean.device
    images = backbone.normalise(to_device(pixels, device))
    maps, context = run_trunk(split, images, dtype)
    embeddings = split.tail(maps, *context)

    def effects() -> Tensor:
        if split.kind is TailKind.CHANNELWISE:
            first, changes = replaced_coordinates(split, maps, context, embeddings)
            return channelwise_effects(head.variants[0], embeddings, first, changes)
        scores = [head(ablated.flatten(0, 1)) for ablated in ablated_embeddings(split, maps, context)]
        return torch.cat([found.unflatten(0, (len(maps), -1)) for found in scores], dim=1)

    found = effects()
    heatmaps = weighted_maps(heatmap_weights(found), maps)
    return {
        "copy_in": clock(lambda: to_device(pixels, device)),
        "normalise": clock(lambda: backbone.normalise(to_device(pixels, device)))
        - clock(lambda: to_device(pixels, device)),
        "trunk": clock(lambda: run_trunk(split, images, dtype)),
        "tail_and_head": clock(lambda: head(split.tail(maps, *context))),
        "effects": clock(effects),
        "heatmap": clock(lambda: weighted_maps(heatmap_weights(found), maps)),
        "copy_out": clock(lambda: heatmaps.cpu()),
    }


def where(device: torch.device) -> dict[str, Any]:
    """The device and the versions."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "memory_MiB": properties.total_memory // 2**20,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        found |= {"card": platform.processor() or platform.machine(), "driver": "none"}
    return found


def _driver() -> str:
    """Version of the driver, which torch does not say."""
    version = Path("/proc/driver/nvidia/version")
    match = re.search(r"Module\s+([\d.]+)", version.read_text()) if version.exists() else None
    return match[1] if match else "unknown"


def run(
    device: torch.device,
    names: tuple[str, ...] = BACKBONES,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    batch: int | None = None,
    runs: int = 10,
    side: int | None = None,
    compile: bool = True,
) -> dict[str, Any]:
    """Measure all of it."""
    if device.type == "cuda":
        # As the jobs set it: float32 means float32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    clock = Clock(device, runs)
    rows = []
    ceilings = {}
    for dtype in dtypes:
        ceilings[str(dtype).split(".")[1]] = top = ceiling(device, dtype, clock, side)
        for name in names:
            for compiled in (False, True) if compile else (False,):
                row = measure(name, device, dtype, batch or BATCHES[device.type], clock, top, compile=compiled)
                rows.append(row)
                print(json.dumps(row), flush=True)
    return {**where(device), "ceiling_multiply_adds_per_s": ceilings, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    text = f"""
        **On {found["card"]}** (driver {found["driver"]}, torch {found["torch"]}): scores and heatmaps from pixels in
        memory. *Ceiling*: share of the multiply-adds of one large matrix product of the same precision. *Effects*: all
        ablations, as a share of the batch.
        """
    cells = [
        (
            row["backbone"],
            row["precision"] + (", compiled" if row["compiled"] else ""),
            row["images_per_pass"],
            f"{row['images_per_s']:,.0f}",
            f"{row['ceiling_share']:.0%}",
            *(f"{1000 * seconds:.2f}" for seconds in row["parts_s"].values()),
            f"{row['parts_s']['effects'] / row['batch_s']:.1%}",
            "–" if row["peak_MiB"] is None else f"{row['peak_MiB']:,.0f}",
        )
        for row in found["rows"]
    ]
    steps = [f"{part.replace('_', ' ')}, ms" for part in found["rows"][0]["parts_s"]]
    header = ("backbone", "precision", "batch", "images/s", "ceiling", *steps, "effects", "peak, MiB")
    return paragraph(text) + "\n" + grid(header, cells)


def keep(found: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write figures and table; card, driver and versions are the name."""
    words = (found["card"], found["driver"], f"torch{found['torch']}", f"cuda{found.get('cuda')}")
    name = "-".join(re.sub("[^a-z0-9.]+", "-", str(word).lower()).strip("-") for word in words)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(found))
    return file


def main(arguments: list[str]) -> int:
    """Run what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure backbones on one device.")
    parser.add_argument("backbones", nargs="*", default=list(BACKBONES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, whose warm-up takes minutes")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is seen by torch; --device cpu shows that the benchmark works")
        return 2
    found = run(
        torch.device(options.device), tuple(options.backbones), batch=options.batch, compile=not options.no_compile
    )
    print(table(found))
    print(f"kept in {keep(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
