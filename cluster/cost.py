"""What a collection costs: GPU hours, decoding cores, bytes and money at 1 million, 100 million and 1 billion images.

    python cluster/cost.py
    python cluster/cost.py --images 5e6 --image-bytes 2e6 --gpu-images-per-s 1200 --gpu-price 0.5 --pictures 0.01

The rates of one core and the bytes of one row are measured (cluster/rates.json says on what; --measure does it again on
this machine). The rate of a GPU is an ASSUMPTION, a share of its peak, until you give the one that the summary of a
run of yours says (--gpu-images-per-s). Prices are examples; look yours up.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

RATES = Path(__file__).with_name("rates.json")
# Multiply-adds of one image's forward pass, in units of 1e9, as torchvision's records say; an operation is half of one.
# The second number: what exact ablation of all maps of the default layer costs over the forward pass (README, "Speed").
BACKBONES = {
    "vgg16": (15.47, 1.76),
    "vgg19": (19.63, 28.9),  # three convolutions follow features.28; at the last one, features.34, it is 1.61
    "resnet152": (11.51, 1.04),
    "densenet161": (7.73, 1.0),
    "barlow_twins": (4.09, 1.06),
    "efficientnet_b3": (1.83, 1.0),
}
MAP_SIDE = {"vgg16": 14, "vgg19": 14, "efficientnet_b3": 8}  # 7 otherwise


@dataclass(frozen=True)
class Assumptions:
    """What a cost is computed from; each is an argument of the command line.

    Args:
        backbone: of `BACKBONES`.
        gpus: that work at the same time.
        gpu_images_per_s: of one GPU; ``None``: assumed from ``gpu_tflops`` and ``gpu_share``.
        gpu_tflops: peak of one GPU in the trunk's precision; 70 is an A10G in bfloat16.
        gpu_share: of the peak that is reached.
        gpu_price: dollars an hour of a node with one GPU.
        gpu_node_cpus: CPUs that come with it; one is the scoring actor's.
        cpu_price: dollars an hour of one CPU of a node without a GPU.
        image_bytes: of one file.
        pictures: share of the images that get a PNG.
        request_price: dollars for a thousand reads of an object.
        storage_price: dollars for a terabyte and month.
        overhead: factor for starting nodes, lost spot nodes and the end of the run.
    """

    backbone: str = "resnet152"
    gpus: int = 8
    gpu_images_per_s: float | None = None
    gpu_tflops: float = 70
    gpu_share: float = 0.3
    gpu_price: float = 0.6
    gpu_node_cpus: int = 8
    cpu_price: float = 0.02
    image_bytes: float = 200e3
    pictures: float = 0.001
    request_price: float = 0.0004
    storage_price: float = 23
    overhead: float = 1.15

    @property
    def gpu_rate(self) -> float:
        """Images a second of one GPU."""
        if self.gpu_images_per_s is not None:
            return self.gpu_images_per_s
        operations, ablation = BACKBONES[self.backbone]
        return self.gpu_tflops * 1e12 * self.gpu_share / (2e9 * operations * ablation)


@dataclass(frozen=True)
class Cost:
    """What one collection costs.

    Args:
        images: in it.
        gpu_hours: of all GPUs together.
        decode_core_hours: of all cores that decode and render together.
        extra_cpus: to rent beside those that come with the GPUs, so that no GPU waits.
        wall_hours: from start to end.
        read_bytes: of images.
        results_bytes: of scores and heatmaps.
        png_bytes: of pictures.
        gpu_dollars, cpu_dollars, request_dollars, storage_dollars: the last a month.
    """

    images: float
    gpu_hours: float
    decode_core_hours: float
    extra_cpus: float
    wall_hours: float
    read_bytes: float
    results_bytes: float
    png_bytes: float
    gpu_dollars: float
    cpu_dollars: float
    request_dollars: float
    storage_dollars: float

    @property
    def dollars(self) -> float:
        """Of the run, without the storage of its results."""
        return self.gpu_dollars + self.cpu_dollars + self.request_dollars


def cost_of(images: float, given: Assumptions, rates: dict[str, Any]) -> Cost:
    """Compute what a collection costs.

    Args:
        images: in the collection.
        given: see there.
        rates: as in `RATES`.
    """
    gpu_hours = images / given.gpu_rate / 3600 * given.overhead
    wall_hours = gpu_hours / given.gpus
    # Read again only where pictures are rendered after all scores are known; here they are in the stream.
    core_s = 1 / rates["decode_images_per_core_s"] + given.pictures / rates["render_images_per_core_s"]
    core_hours = images * core_s / 3600 * given.overhead
    beside = given.gpus * (given.gpu_node_cpus - 1)
    extra = max(0.0, core_hours / wall_hours - beside)
    side = MAP_SIDE.get(given.backbone, 7)
    results = images * rates["results_bytes_per_image"][f"{side}x{side}"]
    pngs = images * given.pictures * rates["png_bytes"]
    return Cost(
        images=images,
        gpu_hours=gpu_hours,
        decode_core_hours=core_hours,
        extra_cpus=extra,
        wall_hours=wall_hours,
        read_bytes=images * given.image_bytes,
        results_bytes=results,
        png_bytes=pngs,
        gpu_dollars=gpu_hours * given.gpu_price,
        cpu_dollars=extra * wall_hours * given.cpu_price,
        request_dollars=images / 1000 * given.request_price,
        storage_dollars=(results + pngs) / 1e12 * given.storage_price,
    )


def table(costs: Sequence[Cost]) -> str:
    """Return the costs as a table, a column for each collection."""
    rows: list[tuple[str, Callable[[Cost], str]]] = [
        ("images", lambda cost: f"{cost.images:,.0f}"),
        ("GPU hours", lambda cost: _short(cost.gpu_hours)),
        ("decoding core hours", lambda cost: _short(cost.decode_core_hours)),
        ("CPUs beside the GPU nodes", lambda cost: f"{cost.extra_cpus:,.0f}"),
        ("hours in all", lambda cost: _short(cost.wall_hours)),
        ("images read", lambda cost: _bytes(cost.read_bytes)),
        ("scores and heatmaps", lambda cost: _bytes(cost.results_bytes)),
        ("pictures", lambda cost: _bytes(cost.png_bytes)),
        ("$ GPU nodes", lambda cost: _short(cost.gpu_dollars)),
        ("$ CPU nodes", lambda cost: _short(cost.cpu_dollars)),
        ("$ reads", lambda cost: _short(cost.request_dollars)),
        ("$ in all", lambda cost: _short(cost.dollars)),
        ("$ a month for the results", lambda cost: _short(cost.storage_dollars)),
    ]
    return "\n".join(f"{name:28}" + "".join(f"{show(cost):>18}" for cost in costs) for name, show in rows)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 1 else f"{value:,.2f}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def measure(seconds: float = 5) -> dict[str, Any]:
    """Measure the rates of one core and the bytes of one row, in processor time, which other work does not change.

    Args:
        seconds: spent on each.
    """
    # As Ray sets it for tasks: threads that wait for each other count as processor time.
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np
    from PIL import Image

    from ais.decoding import Decoding
    from ais.images import Geometry, Limits
    from ais.placement import normalise_for_display, place_on_image
    from ais.render import fit_within, overlay_png

    rng = np.random.default_rng(0)
    # As large in bytes as photographs of this size usually are: detail at every scale.
    levels = [rng.integers(0, 256, (768 // size, 1024 // size, 3), np.uint8) for size in (4, 16, 64, 256)]
    pixels = np.mean([np.asarray(Image.fromarray(level).resize((1024, 768)), float) for level in levels], axis=0)
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "JPEG", quality=90)
    jpeg = data.getvalue()
    geometry = Geometry(input_size=224, resize_size=256, interpolation="bilinear")
    decoding = Decoding(geometry, Limits(), max_side=max(pixels.shape))
    decode = _per_second(lambda: decoding(jpeg), seconds)
    decoded = decoding(jpeg, picture=True)
    image, box = decoded.picture, decoded.box
    assert image is not None
    heatmap = rng.random((7, 7), np.float32)
    png = b""

    def render() -> None:
        nonlocal png
        picture = fit_within(image, 512)
        placed = place_on_image(heatmap, box, image.shape[:2], picture.shape[:2], seen=box)
        png = overlay_png(picture, normalise_for_display(placed, "positive"), "positive", {})

    rate = _per_second(render, seconds)
    return {
        "decode_images_per_core_s": round(decode, 1),
        "render_images_per_core_s": round(rate, 1),
        "results_bytes_per_image": {f"{side}x{side}": _row_bytes(side) for side in (7, 8, 14)},
        "png_bytes": len(png),
        "measured": {
            "image": f"JPEG of 1024×768 pixels, quality 90, {len(jpeg):,} bytes; to 224×224; pictures of 512 pixels",
            "machine": _processor(),
            "python": platform.python_version(),
            "pillow": Image.__version__,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "how": "python cluster/cost.py --measure: one thread, processor time",
        },
    }


def _per_second(work: Callable[[], object], seconds: float) -> float:
    work()
    done, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds:
        work()
        done += 1
    return done / spent


def _row_bytes(side: int, rows: int = 4096) -> float:
    """Bytes of an image's row of results, in a shard of so many rows: heatmaps do not compress, addresses do."""
    import tempfile

    import numpy as np
    import pyarrow as pa

    from ais.runs import results_schema, write_table
    from ais.storage import Storage

    rng = np.random.default_rng(0)
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(4 * rows, np.float32) * 1000), 4)
    columns = {
        "image_id": np.arange(rows),
        "uri": [f"s3://example-collection/photos/{number // 1000:04d}/{number:08d}.jpg" for number in range(rows)],
        "etag": [rng.bytes(16).hex() for _ in range(rows)],
        "width": np.full(rows, 1024, np.int32),
        "height": np.full(rows, 768, np.int32),
        "box": boxes,
        "heatmap_box": boxes,
        "score": rng.random(rows, np.float32),
        "score_std": rng.random(rows, np.float32),
        "heatmap": pa.FixedShapeTensorArray.from_numpy_ndarray(rng.random((rows, side, side), np.float32)),
        "png": pa.nulls(rows, pa.string()),
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Storage().open(folder) / "part.parquet"
        write_table(place, pa.table(columns, schema=results_schema((side, side))))
        return round(Path(place.path).stat().st_size / rows, 1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is below zero or without end")
    return value


def _above_zero(text: str) -> float:
    if _number(text) == 0:
        raise argparse.ArgumentTypeError("0 of them cost nothing; give a number above zero")
    return float(text)


def _whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def main(argv: list[str]) -> int:
    """Compute and print, or measure; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=_above_zero, nargs="+", default=[1e6, 1e8, 1e9], help="sizes of collections")
    parser.add_argument("--rates", type=Path, default=RATES, help="measured rates")
    parser.add_argument("--measure", action="store_true", help="measure this machine into the file of --rates")
    parser.add_argument("--backbone", choices=BACKBONES, default=Assumptions.backbone)
    for name, text in (
        ("gpus", "that work at the same time"),
        ("gpu_images_per_s", "of one GPU, from the summary of a run; default: assumed from the next two"),
        ("gpu_tflops", "peak of one GPU in bfloat16 (70: A10G, 121: L4, 989: H100)"),
        ("gpu_share", "of the peak that is reached"),
        ("gpu_price", "dollars an hour of a node with one GPU (spot)"),
        ("gpu_node_cpus", "CPUs of such a node"),
        ("cpu_price", "dollars an hour of one CPU elsewhere (spot)"),
        ("image_bytes", "of one file"),
        ("pictures", "share of the images that get a PNG"),
        ("request_price", "dollars for a thousand reads"),
        ("storage_price", "dollars for a terabyte and month"),
        ("overhead", "factor for starting nodes, lost nodes, the end of the run"),
    ):
        default = getattr(Assumptions, name)
        may_be_zero = name.endswith("_price") or name in ("image_bytes", "pictures")
        kind = _whole_number if name in ("gpus", "gpu_node_cpus") else _number if may_be_zero else _above_zero
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text} (default {default})"
        )
    arguments = vars(parser.parse_args(argv))
    if arguments["measure"]:
        arguments["rates"].write_text(json.dumps(measure(), indent=2, ensure_ascii=False) + "\n")
        print(f"wrote {arguments['rates']}")
        return 0
    rates = json.loads(arguments["rates"].read_text())
    given = Assumptions(**{name: arguments[name] for name in Assumptions.__dataclass_fields__})
    print(table([cost_of(images, given, rates) for images in arguments["images"]]))
    measured = rates["measured"]
    source = (
        "as you gave it"
        if given.gpu_images_per_s
        else (f"ASSUMED: {given.gpu_share:.0%} of {given.gpu_tflops:g} TFLOP/s, measured on no GPU")
    )
    print(
        f"\n{given.backbone} on {given.gpus} GPUs, {given.gpu_rate:,.0f} images a second each ({source})\n"
        f"decoding {rates['decode_images_per_core_s']:g} and rendering {rates['render_images_per_core_s']:g} images a "
        f"second and core, measured {measured['at'][:10]}\n  on {measured['machine']}\n  with {measured['image']}\n"
        f"traffic between regions and out of the cloud is not in it; keep the nodes beside the bucket"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
