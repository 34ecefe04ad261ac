"""See what a validation shows, and what it refuses to, on images with known truth and several backbones.

Plants images, fits to each backbone a head on their ratings and one on shuffled ratings, validates both, compares the
backbones' heatmaps, and prints which checks each passes. Writes everything under OUTPUT. Nothing is downloaded: the
backbones have random weights, and the demo says so.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import (
    BackboneConfig,
    BackboneOverrides,
    CompareConfig,
    HeatmapsConfig,
    OptionalRatingsConfig,
    PngConfig,
    RatingsConfig,
    TrainConfig,
    ValidateConfig,
    ValidateDemoConfig,
)
from ais.settings import to_yaml

if TYPE_CHECKING:
    from ais.planted import PlantedJudgments


def train_config(config: ValidateDemoConfig, folder: Path, backbone: str, ratings: Path) -> TrainConfig:
    """What `jobs/train.py` is run with."""
    return TrainConfig(
        ratings=RatingsConfig(path=str(ratings)),
        output=str(folder / backbone / f"head-{ratings.stem}"),
        backbone=BackboneConfig(name=backbone, weights="random", seed=config.backbone_seed),
        head=config.head,
        fit=config.fit,
        storage=config.storage,
        compute=config.compute,
    )


def validate_config(config: ValidateDemoConfig, folder: Path, backbone: str, ratings: Path) -> ValidateConfig:
    """What `jobs/validate.py` is run with, for a head."""
    return ValidateConfig(
        ratings=OptionalRatingsConfig(path=str(ratings)),
        head=str(folder / backbone / f"head-{ratings.stem}"),
        backbone=BackboneOverrides(layer=config.layers()[backbone]),
        output=str(folder / backbone / f"validation-{ratings.stem}"),
        masks=str(folder / "planted" / "masks"),
        weighting=config.weighting,
        images_limit=config.images_limit,
        steps=config.steps,
        fill="blurred",
        storage=config.storage,
        compute=config.compute,
    )


def similarity_config(config: ValidateDemoConfig, folder: Path, backbone: str, matrix: Path) -> ValidateConfig:
    """What `jobs/validate.py` is run with, for similarity judgments."""
    return ValidateConfig(
        objective="similarity",
        matrix=str(matrix),
        backbone=BackboneOverrides(
            name=backbone, layer=config.layers()[backbone], weights="random", seed=config.backbone_seed
        ),
        output=str(folder / backbone / "validation-similarity"),
        storage=config.storage,
        compute=config.compute,
    )


def heatmaps_config(config: ValidateDemoConfig, folder: Path, backbone: str, images: Path) -> HeatmapsConfig:
    """What `jobs/heatmaps.py` is run with."""
    return HeatmapsConfig(
        images=str(images),
        output=str(folder),
        run_id=backbone,
        head=str(folder / backbone / "head-true"),
        backbone=BackboneOverrides(layer=config.layers()[backbone]),
        weighting=config.weighting,
        png=PngConfig(select="none"),
        storage=config.storage,
        compute=config.compute,
    )


def compare_config(config: ValidateDemoConfig, folder: Path) -> CompareConfig:
    """What `jobs/compare.py` is run with."""
    names = tuple(config.layers())
    runs = tuple(str(folder / "runs" / name) for name in names)
    return CompareConfig(runs=runs, names=names, output=str(folder / "comparison"), storage=config.storage)


def main(argv: list[str]) -> int:
    """Plant, train, validate, compare, sum up; return the exit code."""
    loaded = load_config(ValidateDemoConfig, argv, doc=__doc__ or "")
    config = loaded.config
    folder = Path(config.output).resolve()

    from ais.backbones import get_spec, inspect_layer

    for name, layer in config.layers().items():  # the last one would be refused after minutes
        inspect_layer(get_spec(name), layer)
    if loaded.dry_run:
        print(to_yaml(config))
        return 0

    from ais.planted import PlantedSpec, make_planted, write_judgments
    from ais.validation.summary import summarise
    from jobs import compare

    started = time.monotonic()
    print("\n1. Planting images whose rating grows with the area of a striped disc\n")
    planted = make_planted(folder / "planted", PlantedSpec(**config.planted.model_dump()))
    judgments = write_judgments(planted)
    print(f"images      {len(planted.images)} in {planted.images_directory}")

    for number, backbone in enumerate(config.layers(), 2):
        print(f"\n{number}. {backbone}: heads on true and on shuffled ratings, validated; its maps; its heatmaps\n")
        if code := validate_backbone(config, folder, backbone, judgments):
            return code

    print(f"\n{len(config.backbones) + 2}. Do the backbones agree about where the evidence is?\n")
    if code := compare.run(compare_config(config, folder)):
        return code

    print("\nWhat was shown, and what was not\n")
    print(summarise(folder, list(config.layers())))
    print(f"\ntook        {time.monotonic() - started:.0f} s")
    return 0


def validate_backbone(config: ValidateDemoConfig, folder: Path, backbone: str, judgments: "PlantedJudgments") -> int:
    """Train and validate on true and on shuffled ratings, validate maps, make heatmaps; return the exit code."""
    from jobs import heatmaps, train, validate

    for ratings in (judgments.true, judgments.shuffled):
        if code := train.run(train_config(config, folder, backbone, ratings)):
            return code
        if code := validate.run(validate_config(config, folder, backbone, ratings)):
            return code
    if code := validate.run(similarity_config(config, folder, backbone, judgments.similarity)):
        return code
    return heatmaps.run(heatmaps_config(config, folder, backbone, judgments.test))


if __name__ == "__main__":
    run_job(main)
