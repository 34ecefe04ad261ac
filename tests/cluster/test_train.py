"""The training job on a real Ray and real files: real workers and drivers are killed, and the heads must not notice.

Nothing is faked. The backbone is a tiny one with random weights, registered under its own name.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ais import Explainer, load_backbone, load_head
from ais.config import FitConfig, HeadConfig
from ais.embeddings import EmbeddingCache, Key
from ais.errors import ConfigError, LockedError, RunError
from ais.lease import hold
from ais.storage import Storage
from ais.training.fit import FitPlan, FittedHead, fit_heads
from ais.training.splits import Split
from jobs.train import main
from tests.kills import PATIENCE_S, ROOT, apart, descendants, joined
from tests.tiny import TINY

# Ray's own context copies its deprecated settings.
pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray"),
]

COUNT, SIZE = 101, 12


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingCache:
    """Embeddings as untrained networks make them: large, and hardly varying."""
    cache = EmbeddingCache(str(tmp_path_factory.mktemp("cache")), "f1")
    values = 1e5 * (1 + 0.02 * np.random.default_rng(0).normal(size=(COUNT, SIZE)))
    for name, rows in enumerate(np.array_split(np.arange(COUNT), 3)):
        cache.write(str(name), [f"/{row}.png" for row in rows], ["1"] * len(rows), values[rows].astype(np.float32))
    return cache


def make_plan(cache: EmbeddingCache, name: str, **fit: object) -> FitPlan:
    """Two heads; the last of three batches has one image, so that a second worker gets none of it."""
    keys = [Key(f"/{row}.png", "1") for row in range(COUNT)]
    scores = cache.load(keys)[:, 0].astype(np.float64) / 1e3
    rows = np.arange(COUNT)
    splits = [Split(rows[:81], rows[81:]), Split(rows[20:], rows[:20])]
    config = FitConfig(variants=2, batch_size=40, learning_rate=0.02, **fit)  # type: ignore[arg-type]
    return FitPlan(name, cache, keys, scores, splits, HeadConfig(hidden=16), config)


def assert_same(first: list[FittedHead], second: list[FittedHead], tolerance: float = 0.0) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.best_epoch == other.best_epoch
        np.testing.assert_allclose(one.validation_rmse, other.validation_rmse, rtol=tolerance)
        for key, value in one.head.state_dict().items():
            scale = float(value.abs().max())
            torch.testing.assert_close(other.head.state_dict()[key], value, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the fits of several tests."""
    return tmp_path_factory.mktemp("fits")


@pytest.fixture(scope="module")
def undisturbed(cache: EmbeddingCache, fits: Path) -> list[FittedHead]:
    plan = make_plan(cache, "undisturbed", workers=2, epochs=20, checkpoint_every=10)
    return fit_heads(plan, Storage().open(str(fits)), "cpu")


def by_one_worker(cache: EmbeddingCache, fits: Path) -> list[FittedHead]:
    plan = make_plan(cache, "alone", workers=1, epochs=20, checkpoint_every=10)
    return fit_heads(plan, Storage().open(str(fits)), "cpu")


def test_one_and_two_workers_fit_the_same_heads(
    cache: EmbeddingCache, undisturbed: list[FittedHead], fits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = by_one_worker(cache, fits)
    # Measured 4e-7 after 60 steps: sums of float32 in another order. The mean over each share instead gives 0.3.
    assert_same(undisturbed, alone, tolerance=1e-5)
    last = alone[1].validation_rmse
    assert last[-1] < 0.5 * last[0]
    lines = capsys.readouterr().out.splitlines()
    stages = [line.split(" · validation")[0] for line in lines]  # a slow machine has time for more than the last ones
    assert [stage for stage in stages if "20/20" in stage] == [f"head {head} of 2 · epoch 20/20" for head in (1, 2)]
    assert f"validation RMSE {last[-1]:.4g} (best {min(last):.4g} at {alone[1].best_epoch})" in lines[-1]


def test_killed_worker(cache: EmbeddingCache, undisturbed: list[FittedHead], tmp_path: Path) -> None:
    plan = make_plan(cache, "killed", workers=2, epochs=20, checkpoint_every=2)
    heads: list[FittedHead] = []
    folder = Storage().open(str(tmp_path))
    thread = threading.Thread(target=lambda: heads.extend(fit_heads(plan, folder, "cpu")), daemon=True)
    thread.start()
    wait_for(lambda: any((tmp_path / "killed").glob("*/checkpoint_*/state.pt")))
    workers = train_workers()
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert_same(undisturbed, heads)


def test_what_a_killed_start_left_half_written(
    cache: EmbeddingCache, undisturbed: list[FittedHead], fits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the test before left it, or else fitted here."""
    by_one_worker(cache, fits)
    running, finished = sorted((fits / "alone").glob("*/checkpoint_*/state.pt"))
    (book,) = (fits / "alone").glob("*/checkpoint_manager_snapshot.json")
    book.write_text("")  # as found after a kill: Ray Train writes it in place
    finished.write_bytes(finished.read_bytes()[:-1000])
    capsys.readouterr()
    heads = by_one_worker(cache, fits)
    said = capsys.readouterr().out
    assert "head 2 of 2 · epoch 20/20" in said
    assert "head 1 of 2" not in said, "it went on in the second head"
    assert_same(undisturbed, heads, tolerance=1e-5)  # of two workers, see above
    # The whole states are now this one and the last start's; the driver may have died before the bundle.
    assert_same(heads, by_one_worker(cache, fits))
    assert capsys.readouterr().out == ""
    assert running.exists()


def test_a_fit_that_waits_in_vain_ends(cache: EmbeddingCache, tmp_path: Path) -> None:
    """A hundred workers, of which each needs a CPU that never comes; then the same plan goes on with what there is."""
    folder = Storage().open(str(tmp_path))
    started = time.monotonic()
    with pytest.raises(RunError, match=r"nothing was finished for 0\.1 minutes, after no epoch: see `ray status`"):
        fit_heads(make_plan(cache, "vain", workers=100, epochs=3), folder, "cpu", stall_minutes=0.1)
    assert time.monotonic() - started < PATIENCE_S / 2
    heads = fit_heads(make_plan(cache, "vain", workers=1, epochs=3), folder, "cpu", stall_minutes=10)
    assert [len(head.validation_rmse) for head in heads] == [3, 3]


def train_workers() -> list[int]:
    """Ids of Ray Train's workers below this process, and of no other Ray on this machine."""
    return [process.pid for process in descendants(os.getpid()) if "RayTrainWorker" in process.title]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 60 grey images whose rating is their brightness, one that is cut off, and one that is not there."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    lines = ["image,score"]
    for index in range(60):
        brightness = rng.uniform(20, 230)
        pixels = np.clip(brightness + rng.normal(0, 10, (40, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        lines.append(f"{index:02d}.png,{brightness / 50:.4f}")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:900])
    (folder / "ratings.csv").write_text("\n".join([*lines, "cut.png,2", "absent.png,3"]) + "\n")
    return folder


def arguments(photos: Path, output: Path, *more: str) -> list[str]:
    return [
        f"ratings.path={photos / 'ratings.csv'}",
        f"output={output}",
        f"cache={photos / 'embeddings'}",
        "backbone.name=tiny",
        "backbone.weights=random",
        "backbone.seed=3",
        "head.hidden=16",
        "fit.variants=2",
        "fit.epochs=30",
        "fit.learning_rate=0.02",
        *more,
    ]


@pytest.fixture(scope="module")
def bundle(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of an undisturbed job."""
    output = tmp_path_factory.mktemp("job") / "head"
    assert main(arguments(photos, output)) == 0
    return output


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_bundle(bundle: Path) -> None:
    assert {path.name for path in bundle.iterdir()} == {
        "config.yaml",
        "errors.parquet",
        "head.json",
        "head.safetensors",
        "history.parquet",
        "metrics.json",
        "predictions.parquet",
        "training-curve.png",
    }
    metrics = json.loads((bundle / "metrics.json").read_text())
    rows = metrics["rows"]
    assert (rows["table"], rows["rated_images"], rows["unreadable"]) == (62, 62, 2)
    assert rows["test"] + rows["train_and_validation"] == 60
    assert sum(rows["unreadable_reasons"].values()) == 2
    errors = {Path(row["uri"]).name: row["stage"] for row in pq.read_table(bundle / "errors.parquet").to_pylist()}
    assert errors == {"cut.png": "decode", "absent.png": "fetch"}
    for split in ("validation", "test"):
        plcc = metrics[split]["PLCC"]
        assert plcc["value"] > 0.9
        assert plcc["low"] <= plcc["value"] <= plcc["high"]

    predictions = pq.read_table(bundle / "predictions.parquet")
    residuals = predictions["predicted"].to_numpy() - predictions["score"].to_numpy()
    assert len(residuals) == rows["test"]
    assert np.sqrt(np.mean(residuals**2)) == pytest.approx(metrics["test"]["RMSE"]["value"])
    assert (predictions["predicted_std"].to_numpy() > 0).all()
    history = pq.read_table(bundle / "history.parquet").to_pandas()
    for variant, facts in enumerate(metrics["variants"]):
        epochs = history[history.variant == variant]
        assert epochs.epoch.tolist() == list(range(1, facts["epochs"] + 1))
        assert epochs.validation_rmse.min() == pytest.approx(facts["validation_rmse"])


def test_library_predicts_what_the_job_predicted(photos: Path, bundle: Path) -> None:
    explainer = Explainer(load_backbone(TINY, weights="random", seed=3), load_head(str(bundle)))
    predictions = pq.read_table(bundle / "predictions.parquet")
    images = [Image.open(photos / name) for name in predictions["image"].to_pylist()]
    # Scores go from 0 to 5.
    np.testing.assert_allclose(explainer.score(images).numpy(), predictions["predicted"].to_numpy(), atol=1e-4)


def test_again_it_does_nothing(photos: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(bundle)
    assert main(arguments(photos, bundle, "fit.checkpoint_every=5")) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert "UNTRAINED" in said
    assert snapshot(bundle) == before


def test_another_configuration_is_refused(photos: Path, bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)holds a head trained on something else.*'seed': 7.*another output"):
        main(arguments(photos, bundle, "fit.seed=7"))


@pytest.mark.usefixtures("bundle")
def test_too_many_unreadable_images(photos: Path, tmp_path: Path) -> None:
    before = snapshot(photos / "embeddings")
    with pytest.raises(RunError, match=r"2 of 62 rated images could not be used \(3\.2%; .*max_error_share=0\.01"):
        main(arguments(photos, tmp_path / "head", "max_error_share=0.01"))
    assert pq.read_table(tmp_path / "head" / "errors.parquet").num_rows == 2
    assert not (tmp_path / "head" / "head.json").exists()
    assert snapshot(photos / "embeddings") == before, "a second training reads the cache"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fit.workers=3", "fit.workers: 3 need a CPU each, and the cluster has, or can grow to, 2; set at most that"),
        ("compute.device=cuda", "compute.device: cuda, and the cluster has no GPU"),
    ],
)
def test_what_the_cluster_can_never_hold_is_refused(photos: Path, tmp_path: Path, setting: str, message: str) -> None:
    """Ray Train would wait for it, and say nothing."""
    given = [each for each in arguments(photos, tmp_path / "head") if not each.startswith(setting.split("=")[0])]
    with pytest.raises(ConfigError, match=message):
        main([*given, setting])


def test_one_start_at_a_time_writes_a_bundle(photos: Path, tmp_path: Path) -> None:
    with hold(Storage().open(str(tmp_path / "head"))), pytest.raises(LockedError, match="it is writing there"):
        main(arguments(photos, tmp_path / "head"))
    assert not list(tmp_path.glob("head/*"))


def ended(given: list[str], checkpoints: Path, number: signal.Signals) -> int:
    """Exit code of the job in a process of its own, on the tests' Ray, sent a signal while it fits."""
    script = "import tests.tiny; from ais.command_line import run_job; from jobs.train import main; run_job(main)"
    # A shell that starts the tests in the background lets them, and so the job, ignore Ctrl-C.
    taken = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    command = [sys.executable, "-c", script, *given]
    with subprocess.Popen(command, cwd=ROOT, env=apart(joined()), preexec_fn=taken) as driver:
        wait_for(lambda: driver.poll() is not None or any(checkpoints.glob("*/*/checkpoint_*/state.pt")))
        driver.send_signal(number)
        return driver.wait(PATIENCE_S)


def test_ctrl_c(photos: Path, tmp_path: Path) -> None:
    """Ray Train's own handler would end the job with exit code 0, as if the head were there."""
    without_end = ["fit.epochs=1000000", "fit.patience=1000000", "fit.checkpoint_every=3"]
    given = [*(each for each in arguments(photos, tmp_path / "head") if not each.startswith("fit.ep")), *without_end]
    assert ended(given, tmp_path / "head" / ".train", signal.SIGINT) == 130
    assert not (tmp_path / "head" / "head.json").exists()


def test_killed_driver(photos: Path, bundle: Path, tmp_path: Path) -> None:
    given = arguments(photos, tmp_path / "head", "fit.checkpoint_every=3")
    assert ended(given, tmp_path / "head" / ".train", signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "head" / "head.json").exists()
    assert main(given) == 0
    assert (tmp_path / "head" / "head.safetensors").read_bytes() == (bundle / "head.safetensors").read_bytes()
