"""The fit of all heads on Ray Train: workers, checkpoints, resuming."""

from __future__ import annotations

import io
import logging
import os
import secrets
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ais.config import FitConfig, HeadConfig
from ais.embeddings import EmbeddingCache, Key
from ais.errors import RunError
from ais.heads import RegressionHead
from ais.storage import Folder, reading, tried
from ais.training.progress import ProgressLines
from ais.training.splits import Split
from ais.training.variant import VariantFit

_STATE_FILE = "state.pt"
# Ray Train looks after its workers every two seconds, and a report waits for that: longer than many epochs take.
_POLL_S = "0.2"


@dataclass(frozen=True)
class FitPlan:
    """Everything that the workers need; plain data. Nothing of the test split is in it.

    Args:
        name: of this training, from its inputs; a start under the same name goes on where earlier ones stopped.
        cache: of the embeddings.
        keys: of the P images to train and validate on.
        scores: ``(P,)`` their ratings.
        splits: rows of them, one split for every head.
        head: the head's sizes.
        fit: how to fit.
    """

    name: str
    cache: EmbeddingCache
    keys: list[Key]
    scores: NDArray[np.float64]
    splits: list[Split]
    head: HeadConfig
    fit: FitConfig


@dataclass(frozen=True)
class FittedHead:
    """One head and how it was fitted.

    Args:
        head: for raw embeddings and rating units.
        best_epoch: whose state it has, counted from 1.
        train_rmse: of every epoch, in rating units, of the batches as they were trained on.
        validation_rmse: of every epoch, in rating units.
    """

    head: RegressionHead
    best_epoch: int
    train_rmse: list[float]
    validation_rmse: list[float]


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to Python.

    Ray Train's own handler waits for its controller, for ever where that waits for workers, and ends the process with
    exit code 0.
    """

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller


def fit_heads(
    plan: FitPlan, checkpoints: Folder, device: str = "auto", stall_minutes: float | None = None
) -> list[FittedHead]:
    """Fit the heads on the cluster that this process has joined.

    A worker that dies is replaced, ``fit.max_failures`` times, and the fit goes on from the last checkpoint; so does
    a fit whose driver died, when it is started again with the same plan and folder: from the checkpoint that got
    furthest of all that earlier starts left whole. Every start keeps its own folder of Ray Train, because the book
    that Ray Train keeps of checkpoints is written in place: a driver killed meanwhile leaves half of it, and another
    version of Ray does not read it.

    Args:
        plan: what to fit.
        checkpoints: folder for them, which all nodes can reach.
        device: ``"cuda"`` gives every worker a GPU, ``"cpu"`` a CPU, ``"auto"`` a GPU where the cluster has any.
        stall_minutes: without a report of a worker after which to give up; ``None``: never.

    Raises:
        RunError: it failed more often than ``fit.max_failures``, it stood still, or a head diverged.
    """
    earlier = _furthest(checkpoints / plan.name)
    if earlier is not None:
        state = _loaded(earlier.read_bytes())
        if len(state["finished"]) == plan.fit.variants:
            return [_fitted(plan, finished) for finished in state["finished"]]
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    workers = plan.fit.workers or (max(1, gpus) if use_gpu else 1)
    with ProgressLines(plan.fit, stall_minutes) as progress:
        trainer = _Trainer(
            _fit_on_worker,
            train_loop_config={"plan": plan, "earlier": earlier},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=RunConfig(
                name=f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
                storage_path=(checkpoints / plan.name).path,
                storage_filesystem=None if checkpoints.local else _arrow(checkpoints),
                failure_config=FailureConfig(max_failures=plan.fit.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=[progress.callback],  # type: ignore[list-item]
            ),
        )
        try:
            checkpoint = trainer.fit().checkpoint
        except ray.train.TrainingFailedError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
            raise RunError(f"fitting stopped: {reason}; the same command goes on from the last checkpoint") from error
        except KeyboardInterrupt:
            if trainer.controller is not None:
                ray.kill(trainer.controller)  # and with it the workers, and those it waits for
            raise
    assert checkpoint is not None, "every head ends with a checkpoint"
    return [_fitted(plan, finished) for finished in _read(checkpoint)["finished"]]


def _fit_on_worker(config: dict[str, Any]) -> None:
    """Runs in every worker; all of them call report at the same epochs, as Ray Train requires."""
    plan: FitPlan = config["plan"]
    earlier: Folder | None = config["earlier"]
    state: dict[str, Any] = {"finished": [], "running": None}
    if (checkpoint := ray.train.get_checkpoint()) is not None:  # of this start: a worker was replaced
        state = _read(checkpoint)
    elif earlier is not None:
        state = _loaded(earlier.read_bytes())
    if len(state["finished"]) == plan.fit.variants:
        return
    embeddings = plan.cache.load(plan.keys)
    for variant in range(len(state["finished"]), plan.fit.variants):
        fit = VariantFit(
            variant,
            plan.splits[variant],
            embeddings,
            plan.scores,
            plan.head,
            plan.fit,
            wrap=ray.train.torch.prepare_model,
            device=ray.train.torch.get_device(),
        )
        if state["running"] is not None:
            fit.resume(state["running"])
        while not fit.done:
            fit.run_epoch()
            if not fit.done and fit.epoch % plan.fit.checkpoint_every == 0:
                state["running"] = fit.state()
                _report(fit, state)
        state["finished"].append({**fit.state(), "head": fit.best_head().state_dict(), "optimiser": None, "best": None})
        state["running"] = None
        _report(fit, state)


def _report(fit: VariantFit, state: dict[str, Any]) -> None:
    metrics = {
        "variant": fit.variant,
        "epoch": fit.epoch,
        "done": fit.done,
        "validation_rmse": fit.validation_rmse[-1],
        "best_rmse": fit.best_rmse,
        "best_epoch": fit.best_epoch,
    }
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / _STATE_FILE)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return _loaded((Path(folder) / _STATE_FILE).read_bytes())


def _loaded(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _furthest(training: Folder) -> Folder | None:
    """The file of the state that got furthest, of those that earlier starts of a training left whole."""
    training.filesystem.invalidate_cache()
    furthest, reached = None, (0, 0)
    with reading(training):
        paths = tried(lambda: training.filesystem.find(training.path))
    for path in paths:
        if not path.endswith(f"/{_STATE_FILE}"):
            continue
        file = Folder(training.filesystem, path)
        with reading(file):
            data = file.read_bytes()
        try:
            state = _loaded(data)
            running = state["running"]
            at = (len(state["finished"]), len(running["validation_rmse"]) if running else 0)
        except Exception:  # cut off by a kill, or of another version: torch raises many kinds
            continue
        if at > reached:
            furthest, reached = file, at
    return furthest


def _fitted(plan: FitPlan, state: dict[str, Any]) -> FittedHead:
    if state["best_epoch"] == 0:
        raise RunError(
            f"a head never reached a finite validation error in {len(state['validation_rmse'])} epochs; lower "
            f"fit.learning_rate={plan.fit.learning_rate:g}"
        )
    hidden, in_features = state["head"]["hidden.weight"].shape
    head = RegressionHead(in_features, hidden, plan.head.dropout)
    head.load_state_dict(state["head"])
    return FittedHead(head.eval(), state["best_epoch"], state["train_rmse"], state["validation_rmse"])


def _arrow(folder: Folder) -> pyarrow.fs.FileSystem:
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.filesystem))
