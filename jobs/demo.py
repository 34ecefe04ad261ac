"""See it work on images with known truth: plant them, train a head, run the heatmaps job, look where it points.

Writes everything under OUTPUT. Nothing is downloaded: the backbone has random weights, and the demo says so.
"""

import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import DemoConfig, HeatmapsConfig, RatingsConfig, ReportConfig, TrainConfig
from ais.settings import to_yaml


def train_config(config: DemoConfig, folder: Path) -> TrainConfig:
    """What `jobs/train.py` is run with."""
    return TrainConfig(
        ratings=RatingsConfig(path=str(folder / "planted" / "ratings.csv")),
        output=str(folder / "head"),
        backbone=config.backbone,
        head=config.head,
        fit=config.fit,
        storage=config.storage,
        compute=config.compute,
    )


def heatmaps_config(config: DemoConfig, folder: Path) -> HeatmapsConfig:
    """What `jobs/heatmaps.py` is run with."""
    return HeatmapsConfig(
        images=str(folder / "planted" / "images"),
        output=str(folder),
        head=str(folder / "head"),
        png=config.png,
        storage=config.storage,
        compute=config.compute,
    )


def report_config(config: DemoConfig, folder: Path, run: str) -> ReportConfig:
    """What `jobs/report.py` is run with."""
    return ReportConfig(
        run=run,
        output=str(folder / "report"),
        title="Planted discs",
        head=str(folder / "head"),
        storage=config.storage,
    )


def main(argv: list[str]) -> int:
    """Plant, train, run, point, report; return the exit code."""
    loaded = load_config(DemoConfig, argv, doc=__doc__ or "")
    config = loaded.config
    folder = Path(config.output).resolve()
    if loaded.dry_run:
        print(to_yaml(config))
        return 0

    from ais.pipeline.prepare import prepare_heatmaps
    from ais.planted import PlantedSpec, make_planted
    from ais.pointing import extreme_pictures, play_pointing_game
    from jobs import heatmaps, report, train

    started = time.monotonic()
    print("\n1. Planting images whose rating grows with the area of a striped disc\n")
    planted = make_planted(folder / "planted", PlantedSpec(**config.planted.model_dump()))
    print(f"images      {len(planted.images)} in {planted.images_directory}")

    print("\n2. Training a head on their ratings (jobs/train.py)\n")
    if code := train.run(train_config(config, folder)):
        return code

    print("\n3. Scores and heatmaps of all of them (jobs/heatmaps.py)\n")
    if code := heatmaps.run(heatmaps_config(config, folder)):
        return code

    print("\n4. Does it point at the disc?\n")
    prepared = prepare_heatmaps(heatmaps_config(config, folder))
    game = play_pointing_game(prepared.run, planted.directory)
    plcc = json.loads((folder / "head" / "metrics.json").read_text())["test"]["PLCC"]
    print(f"PLCC        {plcc['value']:.3f} on the test split (95% interval {plcc['low']:.3f} to {plcc['high']:.3f})")
    print(f"pointing    {game.hit_rate:.2f} of {game.images} heatmaps have their maximum on the disc", end="")
    print(f"; by chance {game.chance:.2f}")
    print(f"run         {prepared.run.folder.address}")
    print("pictures    of the three highest and the three lowest scores:")
    for score, picture in extreme_pictures(prepared.run, folder / "overlays", 3):
        print(f"            {score:5.2f}  {picture}")

    print("\n5. Pages to look at (jobs/report.py)\n")
    report.run(report_config(config, folder, prepared.run.folder.address))
    if prepared.weights.untrained:
        print(
            "\nThe backbone is UNTRAINED: random weights, which is enough to see planted discs and not enough for "
            "photographs. With a network connection, backbone.weights=published backbone.seed=null loads the published "
            "weights; README.md, 'Your own images', goes on from there."
        )
    print(f"\ntook        {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    run_job(main)
