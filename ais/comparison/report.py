"""What a comparison writes and prints.

agreement.parquet      uri, etag, run_a, run_b and a column per metric, null where undefined
matrices.parquet       metric, run_a, run_b, mean, low, high, n, undefined; both orders of every pair
matrices/<metric>.png  the same as a picture
config.yaml            the resolved configuration
summary.json           written last; its presence means complete
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from ais.agreement import METRICS
from ais.comparison.matrix import format_value, matrix_png
from ais.comparison.pairs import MeanAgreement, PairAgreement, mean_agreement
from ais.comparison.sources import ComparedRun
from ais.config import CompareConfig
from ais.runs import write_table
from ais.settings import to_yaml
from ais.storage import Folder

Means = dict[str, MeanAgreement]


def describe_runs(runs: Sequence[ComparedRun]) -> str:
    """Say what is compared, and what to keep in mind about it."""
    lines = [f"runs        {runs[0].describe()}", *(f"            {run.describe()}" for run in runs[1:])]
    if len({run.weighting for run in runs}) > 1:
        lines.append("note        some heatmaps are positive and some signed, which lowers their agreement")
    return "\n".join(lines)


def write_report(
    output: Folder, config: CompareConfig, runs: Sequence[ComparedRun], pairs: Sequence[PairAgreement]
) -> list[Means]:
    """Write everything, the summary last.

    Returns:
        for each pair, the mean agreement by metric.
    """
    if (output / "summary.json").exists():
        (output / "summary.json").remove()  # of an earlier comparison, which is being replaced
    means = [{metric: mean_agreement(values) for metric, values in pair.values.items()} for pair in pairs]
    write_table(output / "agreement.parquet", pa.concat_tables([_agreement_table(pair) for pair in pairs]))
    write_table(output / "matrices.parquet", _matrices_table(pairs, means))
    names = [run.name for run in runs]
    for metric, meaning in METRICS.items():
        cells = {(pair.first, pair.second): each[metric] for pair, each in zip(pairs, means, strict=True)}
        (output / "matrices" / f"{metric}.png").write_bytes(matrix_png(metric, meaning, names, cells))
    (output / "config.yaml").write_text(to_yaml(config))
    summary = _summary(config, runs, pairs, means)
    (output / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return means


def describe_pairs(pairs: Sequence[PairAgreement], means: Sequence[Means]) -> str:
    """Return a table of the means, a row per pair, and what they leave out."""
    names = [f"{pair.first} – {pair.second}" for pair in pairs]
    width = max(map(len, names))
    lines = [f"{'':{width}}  {'images':>8}" + "".join(f"{metric:>13}" for metric in METRICS)]
    for name, pair, each in zip(names, pairs, means, strict=True):
        values = "".join(f"{format_value(each[metric].mean):>13}" for metric in METRICS)
        lines.append(f"{name:{width}}  {pair.images.num_rows:>8,}{values}")
    for name, pair, each in zip(names, pairs, means, strict=True):
        if pair.only_in_first or pair.only_in_second:
            lines.append(
                f"left out    {name}: {pair.only_in_first:,} images only in {pair.first}, {pair.only_in_second:,} only "
                f"in {pair.second}"
            )
        if undefined := {metric: mean.undefined for metric, mean in each.items() if mean.undefined}:
            counts = ", ".join(f"{metric} {count:,}" for metric, count in undefined.items())
            lines.append(f"undefined   {name}: images with a constant or nowhere positive heatmap: {counts}")
    return "\n".join(lines)


def _agreement_table(pair: PairAgreement) -> pa.Table:
    count = pair.images.num_rows
    columns: dict[str, Any] = {
        "uri": pair.images["uri"],
        "etag": pair.images["etag"],
        "run_a": pa.repeat(pair.first, count),
        "run_b": pa.repeat(pair.second, count),
    }
    return pa.table(columns | {metric: pa.array(values, from_pandas=True) for metric, values in pair.values.items()})


def _matrices_table(pairs: Sequence[PairAgreement], means: Sequence[Means]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"metric": metric, "run_a": one, "run_b": other, **each[metric].as_dict()}
            for metric in METRICS
            for pair, each in zip(pairs, means, strict=True)
            for one, other in ((pair.first, pair.second), (pair.second, pair.first))
        ],
        schema=pa.schema(
            [(name, pa.string()) for name in ("metric", "run_a", "run_b")]
            + [(name, pa.float64()) for name in ("mean", "low", "high")]
            + [(name, pa.int64()) for name in ("n", "undefined")]
        ),
    )


def _summary(
    config: CompareConfig, runs: Sequence[ComparedRun], pairs: Sequence[PairAgreement], means: Sequence[Means]
) -> dict[str, Any]:
    return {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [run.facts() for run in runs],
        "grid": {"resolution": config.resolution, "covers": "what both runs looked at of an image"},
        "top_share": config.top_share,
        "intervals": "95%, Student's t over images",
        "metrics": METRICS,
        "pairs": [
            {
                "run_a": pair.first,
                "run_b": pair.second,
                "images": pair.images.num_rows,
                "only_in_a": pair.only_in_first,
                "only_in_b": pair.only_in_second,
                "agreement": {metric: mean.as_dict() for metric, mean in each.items()},
            }
            for pair, each in zip(pairs, means, strict=True)
        ],
    }
