"""The bundle that a training ends in: metrics, predictions, history, picture, and the head last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ais.backbones import Backbone
from ais.embeddings import Key
from ais.errors import HeadError
from ais.heads import HeadEnsemble, save_head
from ais.metrics import regression_metrics
from ais.runs import write_table
from ais.settings import to_yaml
from ais.storage import explain, reading
from ais.training.curve import training_curve
from ais.training.fit import FitPlan, FittedHead
from ais.training.prepare import PreparedTraining, Rows
from ais.training.splits import Split

_ROWS_PER_PASS = 4096
_LEAST_FOR_METRICS = 3


def write_bundle(
    prepared: PreparedTraining,
    plan: FitPlan,
    rows: Rows,
    keys: Sequence[Key],
    heads: Sequence[FittedHead],
    errors: Sequence[dict[str, str]],
    backbone: Backbone,
) -> dict[str, Any]:
    """Evaluate the heads and write the bundle; ``head.json`` comes last and means that it is complete.

    Besides the head: ``config.yaml``, ``metrics.json``, ``history.parquet`` (variant, epoch, train_rmse,
    validation_rmse), ``training-curve.png``, and ``predictions.parquet`` of the test split (image, score, predicted,
    predicted_std). The state of the fit is deleted at the end.

    Args:
        prepared: the training.
        plan: of the fit.
        rows: of the ratings that were used.
        keys: of all ratings, in the embedding cache.
        heads: fitted.
        errors: images without embedding.
        backbone: that made the embeddings.

    Returns:
        the metrics, as in ``metrics.json``.
    """
    ratings, folder = prepared.ratings, prepared.bundle
    ensemble = HeadEnsemble(head.head for head in heads)
    unseen = prepared.cache.load([keys[row] for row in rows.test])
    test = predictions(ensemble, unseen)
    predicted = test.mean(0)
    held_out, validated = held_out_mean(predictions(ensemble, plan.cache.load(plan.keys)), plan.splits)
    metrics = {
        "test": agreement(predicted, ratings.scores[rows.test]),
        "validation": agreement(held_out, plan.scores[validated]),
        "variants": [
            {
                "train": len(split.train),
                "validation": len(split.validation),
                "epochs": len(head.validation_rmse),
                "best_epoch": head.best_epoch,
                "validation_rmse": head.validation_rmse[head.best_epoch - 1],
            }
            for head, split in zip(heads, plan.splits, strict=True)
        ],
        "rows": {
            "table": ratings.rows,
            "without_score": ratings.skipped,
            "averaged": ratings.averaged,
            "rated_images": len(ratings),
            "unreadable": len(errors),
            "unreadable_reasons": dict(Counter(f"{row['stage']}: {row['reason']}" for row in errors)),
            "train_and_validation": len(rows.pool),
            "test": len(rows.test),
            "test_also_in_training": repeated(unseen, plan.cache.load(plan.keys)),
        },
    }
    (folder / "config.yaml").write_text(to_yaml(prepared.config))
    write_table(
        folder / "predictions.parquet",
        pa.table(
            {
                "image": pa.array(ratings.images[rows.test].tolist(), pa.string()),
                "score": ratings.scores[rows.test],
                "predicted": predicted,
                "predicted_std": _spread(test),
            }
        ),
    )
    write_table(folder / "history.parquet", _history(heads))
    (folder / "training-curve.png").write_bytes(training_curve(heads))
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    save_head(
        prepared.config.output,
        ensemble,
        backbone,
        prepared.config.preprocessing.mode,
        {"identity": prepared.identity, "trained_on": len(rows.pool), "untrained_backbone": backbone.untrained},
        prepared.storage,
    )
    with suppress(Exception):  # the head is complete; what stays of the fit takes room and does no harm
        prepared.checkpoints.filesystem.rm(prepared.checkpoints.path, recursive=True)
    return metrics


@torch.inference_mode()
def predictions(ensemble: HeadEnsemble, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the scores ``(K, N)`` of every head for embeddings ``(N, D)``."""
    parts = torch.from_numpy(embeddings).split(_ROWS_PER_PASS)
    return torch.cat([ensemble.each(part) for part in parts], 1).double().numpy()


def agreement(predicted: NDArray[np.float64], rated: NDArray[np.float64]) -> dict[str, Any]:
    """Return n and, as JSON values, RMSE, PLCC, SRCC and KRCC with 95% intervals.

    Where fewer than three images or constant ratings leave them undefined, ``undefined`` says so instead.
    """
    if len(rated) < _LEAST_FOR_METRICS:
        return {"n": len(rated), "undefined": f"{len(rated)} images are too few"}
    if np.ptp(rated) == 0:
        return {"n": len(rated), "undefined": f"all ratings are {rated[0]:g}"}
    found = regression_metrics(predicted, rated)
    return {"n": len(rated), **{name.upper(): interval.as_dict() for name, interval in found.items()}}


def repeated(embeddings: NDArray[np.float32], among: NDArray[np.float32]) -> int:
    """Return how many of ``(N, D)`` embeddings are among ``(M, D)`` others to the last bit: one picture, two names.

    At least so many: the same pixels in a batch of another size can differ in the last bit.
    """
    known = {row.tobytes() for row in among}
    return sum(row.tobytes() in known for row in embeddings)


def held_out_mean(each: NDArray[np.float64], splits: Sequence[Split]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Average the scores ``(K, N)`` of every head over those heads that did not train on the image.

    Returns:
        the means, and which of the N images they are of: those that some head was validated on.
    """
    held_out = np.zeros(each.shape, bool)
    for variant, split in enumerate(splits):
        held_out[variant, split.validation] = True
    rows = np.flatnonzero(held_out.any(0))
    return each[:, rows].mean(0, where=held_out[:, rows]), rows


def _spread(each: NDArray[np.float64]) -> pa.Array:
    """Standard deviation over heads; null where there is one."""
    if len(each) == 1:
        return pa.nulls(each.shape[1], pa.float64())
    return pa.array(each.std(0, ddof=1))


def _history(heads: Sequence[FittedHead]) -> pa.Table:
    epochs = [np.arange(1, len(head.validation_rmse) + 1) for head in heads]
    return pa.table(
        {
            "variant": np.repeat(np.arange(len(heads)), [len(part) for part in epochs]),
            "epoch": np.concatenate(epochs),
            "train_rmse": np.concatenate([head.train_rmse for head in heads]),
            "validation_rmse": np.concatenate([head.validation_rmse for head in heads]),
        }
    )


def describe_finished(prepared: PreparedTraining) -> str:
    """As `describe_metrics`, of a bundle that is complete.

    Raises:
        HeadError: its ``metrics.json`` is lost or damaged.
        StorageError: it cannot be read.
    """
    place = prepared.bundle / "metrics.json"
    try:
        with reading(place):
            data = place.read_bytes()
        return describe_metrics(prepared, json.loads(data))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadError(
            f"the head in {prepared.bundle.address!r} is complete, but its metrics.json cannot be used: "
            f"{explain(error)}; copy the bundle whole, or give another output to train it again"
        ) from error


def describe_metrics(prepared: PreparedTraining, metrics: dict[str, Any]) -> str:
    """Say in a few lines how good the head is and where it is."""
    lines = []
    for split in ("validation", "test"):
        values = metrics[split]
        if "undefined" in values:
            lines.append(f"{split:<12}{values['n']:,} images; no metrics: {values['undefined']}")
            continue
        shown = " · ".join(_interval(name, values[name]) for name in ("PLCC", "SRCC", "KRCC", "RMSE"))
        lines.append(f"{split:<12}{values['n']:,} images · {shown}")
    rows = metrics["rows"]
    if rows["unreadable"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rows["unreadable_reasons"].items())
        lines.append(f"left out    {rows['unreadable']:,} images ({reasons}), see errors.parquet")
    if same := rows.get("test_also_in_training"):
        lines.append(
            f"careful     {same:,} of {rows['test']:,} test images are training images under other names, of which the "
            "head knows the rating: name each picture once"
        )
    if prepared.weights.untrained:
        lines.append("            the backbone is UNTRAINED: its weights are random")
    lines.append(f"head        {prepared.bundle.address}")
    return "\n".join(lines)


def _interval(name: str, values: dict[str, Any]) -> str:
    if values["value"] is None:
        return f"{name} undefined"
    ends = "" if values["low"] is None else f" [{values['low']:.3g}, {values['high']:.3g}]"
    return f"{name} {values['value']:.3g}{ends}"
