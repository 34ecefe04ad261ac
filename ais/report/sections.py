"""What the report says: figures with a sentence on how to read each, and what to distrust."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from ais.report import charts
from ais.report.formats import counted, decimals_for, fixed, percent, short, whole
from ais.report.meaning import AGAINST_PEOPLE, is_against_people, meaning_of
from ais.report.scores import Scores
from ais.report.sources import Comparison, Head, Importance, Sources, Validation, column

_METHODS = {
    "ais": ("heatmap", "main"),
    "Grad-CAM": ("Grad-CAM", "other"),
    "random head": ("random head", "third dashed"),
    "centre": ("centre", "fourth"),
    "random": ("random order", "quiet"),
}
_ORDERS = {
    "ais": ("by AIS", "main"),
    "random": ("random order", "quiet"),
    "reversed": ("reversed order", "other"),
}
_OUTCOMES = ("against", "not shown", "not measured", "shown")
_COARSE_CELLS = 10
_SIGNED_METRICS = ("pearson", "cosine", "ssim")
_METRIC_NAMES = {
    "pearson": "Pearson correlation",
    "cosine": "Cosine similarity",
    "mse": "Mean squared difference",
    "ssim": "Structural similarity",
    "emd": "Earth mover's distance",
    "top_overlap": "Overlap of the highest cells",
}


@dataclass(frozen=True)
class Figure:
    """A chart with its words.

    Args:
        title: heading.
        chart: SVG.
        reading: one sentence on how to read it.
        wide: takes the whole width of the page.
    """

    title: str
    chart: Markup
    reading: str
    wide: bool = False


@dataclass(frozen=True)
class Caution:
    """Something that limits how far the report can be trusted.

    Args:
        level: ``"stop"``: do not rely on it; ``"care"``: keep it in mind; ``"good"``: what speaks for it.
        title: in a few words.
        text: what it means.
    """

    level: Literal["stop", "care", "good"]
    title: str
    text: str

    @property
    def word(self) -> str:
        """The level for people who do not see its colour."""
        return {"stop": "Do not rely on it", "care": "Keep in mind", "good": "Speaks for it"}[self.level]


@dataclass(frozen=True)
class Overview:
    """The scores of the run in numbers.

    Args:
        count: of finite scores.
        undefined: of the others.
        low: lowest score.
        high: highest score.
        quantiles: at 5, 25, 50, 75 and 95%.
        decimals: digits after the point that tell scores of this run apart.
        distribution: how many images have which score; ``None`` where all have the same.
        mean_spread: mean standard deviation over heads; ``None`` where there is one head.
    """

    count: int
    undefined: int
    low: float
    high: float
    quantiles: tuple[float, float, float, float, float]
    decimals: int
    distribution: Figure | None
    mean_spread: float | None

    def score(self, value: float) -> str:
        """A score, or a difference of scores, with the digits of this run."""
        return fixed(value, self.decimals)


def overview_of(scores: Scores) -> Overview | None:
    """Numbers and distribution; ``None`` where no image has a score."""
    if scores.count == 0:
        return None
    shares = (0, 0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999, 1)
    low, rare_low, *middle, rare_high, high = (float(value) for value in scores.quantiles(shares))
    decimals = decimals_for(middle[4] - middle[0] or high - low)
    return Overview(
        scores.count,
        scores.undefined,
        low,
        high,
        (middle[0], middle[1], middle[2], middle[3], middle[4]),
        decimals,
        _distribution(scores, (low, high), (rare_low, rare_high), middle, decimals) if high > low else None,
        scores.mean_spread,
    )


def _distribution(
    scores: Scores, ends: tuple[float, float], usual: tuple[float, float], middle: Sequence[float], decimals: int
) -> Figure:
    # A few scores far out would squeeze all others into one bar.
    squeezed = ends[1] - ends[0] > 5 * (usual[1] - usual[0]) > 0
    edges = charts.bins(*(usual if squeezed else ends))
    counts = scores.histogram(edges)
    beyond = scores.count - int(counts.sum())
    marks = [(middle[0], "5%"), (middle[2], "median"), (middle[4], "95%")]
    title = f"Distribution of {counted(scores.count, 'score')}, median {fixed(middle[2], decimals)}"
    reading = (
        "Each bar counts the images whose score lies there; half of all images are left of the median, nine in ten "
        "between the outer lines."
    )
    if beyond:
        ends_text = f"from {short(ends[0])} to {short(ends[1])}"
        reading += f" {counted(beyond, 'image')} beyond the ends, {ends_text}, are not drawn."
    chart = charts.histogram(edges, counts, title, "score", marks)
    return Figure("How the scores are spread", chart, reading, wide=True)


def head_figures(head: Head) -> list[Figure]:
    """Predicted against rated, and the training curve."""
    figures = []
    if head.predictions is not None and head.predictions.num_rows:
        rated, predicted = column(head.predictions, "score"), column(head.predictions, "predicted")
        finite = np.isfinite(rated) & np.isfinite(predicted)
        if finite.any():
            count = int(finite.sum())
            chart = charts.scatter(
                rated[finite],
                predicted[finite],
                f"Predicted score against rating for {counted(count, 'test image')}",
                "rating by people",
                "predicted score",
            )
            figures.append(
                Figure(
                    "Predicted against rated",
                    chart,
                    f"Each point is one of the {counted(count, 'test image')}, which training never used; on the line, "
                    "prediction and rating are equal, and the narrower the cloud around it, the better.",
                )
            )
    if head.history is not None and head.history.num_rows:
        figures.append(_training_curve(head))
    return figures


def _training_curve(head: Head) -> Figure:
    assert head.history is not None
    variant, epoch, train, validation = (
        column(head.history, name) for name in ("variant", "epoch", "train_rmse", "validation_rmse")
    )
    best = {index: entry.get("best_epoch") for index, entry in enumerate(head.metrics.get("variants", []))}
    drawn = []
    for number in np.unique(variant):
        own = variant == number
        dots = np.flatnonzero(epoch[own] == (best.get(int(number)) or -1))
        drawn.append(charts.Line(epoch[own], train[own], "training", "quiet"))
        dot = int(dots[0]) if dots.size else None
        drawn.append(charts.Line(epoch[own], validation[own], "validation", "main", dot))
    chart = charts.lines(
        drawn, "Training and validation error over the epochs", "epoch", "RMSE, in rating units", zero=True
    )
    heads = "" if len(drawn) == 2 else f" (one pair of lines for each of the {len(drawn) // 2} heads)"
    return Figure(
        "Training curve",
        chart,
        f"The error should fall and then level off{heads}; the dot is the epoch that was kept, the last one before the "
        "head starts to learn its training images by heart.",
    )


def metrics_table(head: Head) -> list[dict[str, str]]:
    """Rows of the head's agreement with ratings on test and validation images."""
    rows = []
    for split, what in (("test", "test images, never used in training"), ("validation", "validation images")):
        values = head.metrics.get(split)
        if not isinstance(values, dict):
            continue
        row = {"split": what, "n": whole(int(values.get("n", 0)))}
        for name in ("PLCC", "SRCC", "KRCC", "RMSE"):
            row[name] = interval_text(values.get(name), values.get("undefined"))
        rows.append(row)
    return rows


def interval_text(values: dict[str, Any] | None, undefined: str | None = None) -> str:
    """Return ``0.94 (0.86 to 0.97)``; or why there is no value."""
    if not values or values.get("value") is None:
        return undefined or "undefined"
    if values.get("low") is None or values.get("high") is None:
        return short(values["value"])
    return f"{short(values['value'])} ({short(values['low'])} to {short(values['high'])})"


def importance_figure(bundle: Importance) -> Figure:
    """Return the ranking of the feature maps by their AIS."""
    ais = column(bundle.table, "ais")
    order = np.argsort(-ais, kind="stable")
    low = high = None
    if "ais_low" in bundle.table.column_names:
        low, high = (column(bundle.table, name)[order] for name in ("ais_low", "ais_high"))
    ranks = np.arange(1, len(ais) + 1)
    objective = str(bundle.record["objective"])
    chart = charts.lines(
        [charts.Line(ranks, ais[order], "", "main", low=low, high=high)],
        f"AIS of {len(ais):,} feature maps by rank, objective {objective}",
        "feature map, by rank (logarithmic)",
        "AIS",
        zero=True,
        logarithmic=True,
        x_range=(1, max(2, len(ais))),
    )
    positive = np.clip(ais, 0, None)
    half = int(np.searchsorted(np.cumsum(np.sort(positive)[::-1]), positive.sum() / 2) + 1) if positive.any() else 0
    share = (
        f" Half of all positive importance is in the top {counted(half, 'map')} of {len(ais):,}."
        if half
        else " No map has positive importance."
    )
    over = f" over {counted(int(bundle.record['images']), 'image')}" if "images" in bundle.record else ""
    band = "; the band is its 95% interval over the images" if low is not None else ""
    return Figure(
        f"AIS ranking, objective {objective}",
        chart,
        f"The importance of each feature map{over}, largest first{band}. {_sign(bundle)}{share}{_correlation(bundle)}",
    )


def _sign(bundle: Importance) -> str:
    sign, seen = str(bundle.record.get("sign", "")).strip(), _maybe_fitted(bundle)
    said = f"AIS is the {sign}." if sign else ""
    return f"{said} It was measured on {seen}." if seen and seen not in sign else said


def _correlation(bundle: Importance) -> str:
    """How far the model's similarities agree with people's; empty for other objectives."""
    found = bundle.record.get("correlation")
    if not isinstance(found, dict):
        return ""
    said = f" R of all maps with people is {interval_text(found)}"
    return f"{said}: {AGAINST_PEOPLE}" if is_against_people(bundle) else f"{said}."


def _maybe_fitted(bundle: Importance) -> str:
    """The images that errors were measured on, where the head may have been fitted to them; empty otherwise."""
    record = bundle.record
    if record["objective"] != "error" or record.get("held_out") is True:
        return ""
    return str(record.get("measured_on") or "images that the head may have been fitted to")


def importance_top(bundle: Importance, count: int = 8) -> list[dict[str, str]]:
    """Rows of the maps with the largest AIS."""
    ais = column(bundle.table, "ais")
    with_interval = "ais_low" in bundle.table.column_names
    rows = []
    for rank, index in enumerate(np.argsort(-ais, kind="stable")[:count], 1):
        row = {"rank": str(rank), "map": str(index), "ais": short(float(ais[index])), "interval": "–"}
        if with_interval:
            low, high = (float(column(bundle.table, name)[index]) for name in ("ais_low", "ais_high"))
            row["interval"] = f"{short(low)} to {short(high)}"
        rows.append(row)
    return rows


def validation_figures(validation: Validation) -> list[list[Figure]]:
    """Return the cumulative curves, and deletion and insertion."""
    cumulative, deletion = [], []
    if validation.curves is not None:
        measures = dict.fromkeys(validation.curves["measure"].to_pylist())
        cumulative = [_cumulative(validation, str(measure)) for measure in measures]
    if validation.deletion is not None:
        table = validation.deletion.to_pydict()
        deletion = [
            _deletion(table, fill, mode)
            for fill in dict.fromkeys(table["fill"])
            for mode in dict.fromkeys(table["mode"])
        ]
    return [cumulative, deletion]


def _cumulative(validation: Validation, measure: str) -> Figure:
    assert validation.curves is not None
    table = validation.curves.to_pydict()
    drawn = []
    for order in dict.fromkeys(table["order"]):
        own = [
            (maps, test)
            for one, other, maps, test in zip(
                table["measure"], table["order"], table["maps"], table["test"], strict=True
            )
            if (one, other) == (measure, order) and maps > 0
        ]
        name, style = _ORDERS.get(order, (order, "third"))
        if own:
            maps, test = (np.array(values, np.float64) for values in zip(*own, strict=True))
            drawn.append(charts.Line(maps, test, name, style))
    chart = charts.lines(drawn, f"{measure} on test images by number of maps kept", "maps kept", measure)
    side = "below" if measure.upper() == "RMSE" else "above"
    return Figure(
        f"Adding maps by importance: {measure}",
        chart,
        "The head sees only the maps kept so far, and is tested on images that the ranking has not seen; if the AIS is "
        f"right, its line is {side} the random order.",
    )


def _deletion(table: dict[str, list[Any]], fill: str, mode: str) -> Figure:
    drawn = []
    for method in dict.fromkeys(table["method"]):
        own = [
            (share, score)
            for one, two, three, share, score in zip(
                table["fill"], table["mode"], table["method"], table["share"], table["score"], strict=True
            )
            if (one, two, three) == (fill, mode, method)
        ]
        name, style = _METHODS.get(method, (method, "quiet"))
        shares, score = (np.array(values, np.float64) for values in zip(*own, strict=True))
        drawn.append(charts.Line(shares, score, name, style))
    verb, better = ("deleted", "sooner the score falls") if mode == "deletion" else ("inserted", "sooner it rises")
    chart = charts.lines(
        drawn, f"Mean score as more of the image is {verb}, {fill} fill", f"share of the image {verb}", "mean score"
    )
    return Figure(
        f"{mode.capitalize()}, {fill} fill",
        chart,
        f"Parts of the image are {verb}, the heatmap's strongest first: the {better}, the more the head depends on "
        "what the heatmap shows. A heatmap of a random head should do worse.",
    )


def checks_figure(validation: Validation) -> list[dict[str, Any]]:
    """The checks by outcome, each with its figures, those against the heatmaps first."""
    groups = []
    for outcome in _OUTCOMES:
        checks = [check for check in validation.record["checks"] if check.get("outcome") == outcome]
        if checks:
            rows = [
                {"claim": str(check["claim"]), "figures": interval_text(check), "n": whole(int(check.get("n") or 0))}
                for check in checks
            ]
            groups.append({"outcome": outcome, "checks": rows})
    return groups


def heatmap_facts(validation: Validation) -> list[tuple[str, str]]:
    """What a validation found of the heatmaps themselves, as claims and figures; empty for one that looked at none."""
    found = validation.record.get("heatmaps")
    if not isinstance(found, dict):
        return []
    weighting = validation.record.get("weighting")
    facts = []
    for key, claim in (
        ("random_head_correlation", "rank correlation with the heatmaps of heads that were never fitted"),
        ("variant_correlation", "rank correlation between the variants of the head"),
        ("plain_correlation", "rank correlation with the plain sum of all feature maps"),
    ):
        values = found.get(key)
        values = values.get(weighting) if isinstance(values, dict) and weighting in values else values
        if isinstance(values, dict) and values.get("value") is not None:
            facts.append((claim, interval_text(values)))
    pointing = found.get("pointing")
    ours = pointing.get("ais") if isinstance(pointing, dict) else None
    if isinstance(ours, dict) and isinstance(ours.get("hit_rate"), dict):
        chance = f"; by chance {short(ours['chance'])}" if isinstance(ours.get("chance"), float) else ""
        facts.append(("share of heatmaps with their maximum inside the mask", interval_text(ours["hit_rate"]) + chance))
    return facts


def comparison_figures(comparison: Comparison) -> list[Figure]:
    """A matrix of the runs for each metric."""
    names = [str(run["name"]) for run in comparison.record["runs"]]
    place = {name: index for index, name in enumerate(names)}
    figures = []
    for metric, meaning in comparison.record["metrics"].items():
        rows = [row for row in comparison.matrices.to_pylist() if row["metric"] == metric]
        means, lows, highs = (np.full((len(names),) * 2, np.nan) for _ in range(3))
        for row in rows:
            cell = place[row["run_a"]], place[row["run_b"]]
            for grid, key in ((means, "mean"), (lows, "low"), (highs, "high")):
                grid[cell] = np.nan if row[key] is None else row[key]
        signed = metric in _SIGNED_METRICS
        finite = np.abs(means[np.isfinite(means)])
        highest = 1.0 if signed or metric == "top_overlap" else float(finite.max(initial=0)) or 1.0

        def note(row: int, col: int, lows: np.ndarray = lows, highs: np.ndarray = highs) -> str:
            if not math.isfinite(lows[row, col]):
                return ""
            return f"{lows[row, col]:.2g} to {highs[row, col]:.2g}".replace("-", "−")

        title = _METRIC_NAMES.get(metric, metric)
        chart = charts.matrix(
            names, means, note, f"{title} between the heatmaps of runs", signed=signed, highest=highest
        )
        figures.append(
            Figure(
                title,
                chart,
                f"{str(meaning)[:1].upper()}{str(meaning)[1:].replace(' -', ' −')}. Each square is the mean over the "
                "images that two runs share, with its 95% interval.",
            )
        )
    return figures


def cautions(
    sources: Sources,
    overview: Overview | None,
    failed: int,
    looked_at: float | None,
    outside: float | None,
    changed: int,
) -> list[Caution]:
    """Everything that limits how far to trust the report, the gravest first.

    Args:
        sources: of the report.
        overview: of the scores.
        failed: images in errors.
        looked_at: mean share of an image's area that the model saw, over the images shown.
        outside: share of the scores beyond the ratings of the test images.
        changed: images shown whose original is no longer the one that was scored.
    """
    found = [*_model_cautions(sources), *_run_cautions(sources, overview, failed, outside)]
    if overview:
        found += _heatmap_cautions(sources, looked_at)
    if changed:
        found.append(
            Caution(
                "care",
                f"{counted(changed, 'original')} changed since the run",
                "Scores and heatmaps are of the images as they were then, and what is there now is not shown. "
                "A new run scores what is there now.",
            )
        )
    if overview and overview.mean_spread is None:
        found.append(
            Caution(
                "care",
                "One head, no spread",
                "The scores come from a single head, so nothing here says how much a score would differ if it were "
                "trained again. jobs/train.py with fit.variants=5 gives each score a standard deviation.",
            )
        )
    levels = ("stop", "care", "good")
    return sorted(found, key=lambda caution: levels.index(caution.level))


def _model_cautions(sources: Sources) -> list[Caution]:
    found = []
    if sources.untrained:
        seed = sources.record["weights"].get("seed")
        found.append(
            Caution(
                "stop",
                "The backbone is UNTRAINED",
                f"Its weights are random{'' if seed is None else f' (seed {seed})'}. That is enough to see planted "
                "shapes and not enough for photographs: take what follows as a trial of the machinery, no more.",
            )
        )
    found.append(verdict(sources))
    test = sources.head.metrics.get("test") if sources.head else None
    if isinstance(test, dict) and isinstance(test.get("PLCC"), dict) and test["PLCC"].get("value") is not None:
        value, low = test["PLCC"]["value"], test["PLCC"].get("low")
        weak = low is None or low < 0.5
        found.append(
            Caution(
                "care" if weak else "good",
                f"The head agrees with ratings at PLCC {short(value)}",
                f"Measured on {counted(int(test.get('n', 0)), 'image')} that training never used: "
                f"{interval_text(test['PLCC'])}, 95% interval. "
                + (
                    "That is little: read single scores with caution." if weak else "1 would be perfect, 0 no relation."
                ),
            )
        )
    else:
        found.append(
            Caution(
                "care",
                "How well the head predicts is not known here",
                "No metrics of the head were found; give its bundle as head=… to see how well it agrees with ratings.",
            )
        )
    return found


def verdict(sources: Sources) -> Caution:
    """What the validation came to, or that there was none, or none of heatmaps like these."""
    if sources.validation is None:
        return Caution(
            "stop" if sources.untrained else "care",
            "Not validated",
            "Nobody has measured whether these heatmaps are true. jobs/validate.py does, on rated images that the head "
            "has not seen; the report takes its output as validation=DIR.",
        )
    word, _, text = str(sources.validation.record["conclusion"]).partition(":")
    title, level = {
        "PASSED": ("Validation passed", "good"),
        "PASSED IN PART": ("Validation passed in part", "care"),
        "FAILED": ("Validation failed", "stop"),
    }.get(word.strip(), ("What the validation came to", "care"))
    text = text.strip()
    text = (text[:1].upper() + text[1:]) or word
    if differences := _differences(sources):
        # A head that failed there fails here; one that passed does not pass here.
        text = f"{differences} What it found: {title[:1].lower()}{title[1:]}. {text}"
        title, level = "Validation is of other heatmaps", "stop" if level == "stop" else "care"
    return Caution(level, title, text)  # type: ignore[arg-type]


def _differences(sources: Sources) -> str:
    """In what the heatmaps of the run are not those that were validated; empty where they are the same kind."""
    assert sources.validation is not None
    found = []
    if sources.record["identity"].get("importance") is not None:
        found.append(
            "It measured heatmaps of each image's own effects; those of this run are weighted by one importance of the "
            "maps for all images."
        )
    validated = str(sources.validation.record.get("weighting", sources.weighting))
    if validated != sources.weighting:
        found.append(
            f"It measured heatmaps with {validated} weighting; those of this run have {sources.weighting} weighting."
        )
    return " ".join(found)


def _run_cautions(sources: Sources, overview: Overview | None, failed: int, outside: float | None) -> list[Caution]:
    found = []
    listed = int(sources.record["images"])
    if sources.summary is None:
        found.append(
            Caution(
                "stop",
                "The run is not complete",
                f"{counted(listed, 'image')} were listed, {whole((overview.count if overview else 0) + failed)} "
                "are done. Start the run again with the same command, then make the report again.",
            )
        )
    if failed:
        share = failed / listed if listed else 0
        found.append(
            Caution(
                "stop" if share > 0.2 else "care",
                f"{percent(share)} of the images could not be used",
                f"No score for {whole(failed)} of {counted(listed, 'image')}. If they have something in common, the "
                "distribution of the scores leaves it out.",
            )
        )
    if overview and overview.undefined:
        found.append(
            Caution(
                "stop",
                f"{counted(overview.undefined, 'score')} not finite",
                "The network overflowed on these images; they are left out of everything here.",
            )
        )
    if outside and outside > 0.01:
        found.append(
            Caution(
                "care",
                f"{percent(outside)} of the scores lie beyond the ratings",
                "They are lower than the lowest or higher than the highest rating of the test images: there the head "
                "extends a line that no rating supports.",
            )
        )
    return found


def _heatmap_cautions(sources: Sources, looked_at: float | None) -> list[Caution]:
    _, height, width = sources.map_shape
    coarse = max(height, width) < _COARSE_CELLS
    found = [
        Caution(
            "care",
            f"A heatmap has {height} × {width} cells",
            f"One cell covers 1/{width} of the width and 1/{height} of the height of what the model saw, and looks at "
            "more than it covers. Colours between cells are interpolated: nothing smaller than a cell is located"
            + (", and this map is coarse." if coarse else "."),
        ),
        Caution(
            "care",
            "Colours are scaled image by image",
            "Each heatmap is divided by its own maximum: colours compare places in one image, not one image with "
            "another.",
        ),
    ]
    meaning, bundle = meaning_of(sources), sources.run_importance
    if meaning.ranking:
        found.append(
            Caution(
                "care",
                "One importance of the maps for all images",
                "The heatmaps are weighted by one importance of the feature maps, not by what each map does in each "
                f"image. {meaning.ranking}",
            )
        )
    if bundle and is_against_people(bundle):
        found.append(
            Caution(
                "stop",
                "Importance was measured against people",
                f"R of all maps with people is {interval_text(bundle.record['correlation'])}: {AGAINST_PEOPLE}",
            )
        )
    if bundle and (seen := _maybe_fitted(bundle)):
        found.append(
            Caution(
                "care",
                f"The maps were ranked on {seen}",
                "Of an image that a head has learned by heart, taking away any map makes the prediction worse, so that "
                "almost every map seems to help. jobs/importance.py measures errors on the head's test split, unless "
                "held_out=false.",
            )
        )
    if looked_at is not None and looked_at < 0.995:
        found.append(
            Caution(
                "care",
                f"{percent(1 - looked_at)} of an image was not looked at",
                "The model sees the central square of each image. The rest, on average that much of the images shown "
                "here, is dimmed and had no part in the score.",
            )
        )
    if sources.weighting == "positive":
        found.append(
            Caution(
                "care",
                f"Only what {meaning.adds} is shown",
                f"The weighting is positive, as in the paper: feature maps that {meaning.take} are left out. A run "
                "with weighting=signed shows both.",
            )
        )
    return found


def made_of(sources: Sources) -> list[tuple[str, Sequence[tuple[str, str]]]]:
    """Groups of facts: name and value."""
    record, identity = sources.record, sources.record["identity"]
    channels, height, width = sources.map_shape
    weights = record["weights"]
    source = f"random, seed {weights.get('seed')}: UNTRAINED" if sources.untrained else str(weights.get("source"))
    model = [
        ("backbone", str(record["backbone"])),
        ("weights", source),
        ("weights fingerprint", str(weights.get("fingerprint"))),
        ("licence of the weights", str(weights.get("licence") or "not stated")),
        ("layer", f"{record['layer']['name']}: {channels:,} maps of {height} × {width}"),
        ("preprocessing", str(identity.get("preprocessing"))),
        ("precision", str(identity.get("precision"))),
        ("head", str(identity.get("head"))),
        ("importance", str(identity.get("importance") or "each image's own, by exact ablation")),
        ("weighting", sources.weighting),
    ]
    run = [
        ("run", str(record.get("run_id", sources.run.run_id))),
        ("folder", sources.run.folder.address),
        ("images from", str(identity.get("images"))),
        ("listed", f"{counted(int(record['images']), 'image')}, {record.get('listed_at', '')}"),
    ]
    if sources.summary:
        run.append(("finished", str(sources.summary.get("finished_at"))))
    if sources.head:
        run.append(("head bundle", sources.head.address))
    run += [("importance bundle", bundle.address) for bundle in sources.importance]
    if sources.validation:
        run.append(("validation", sources.validation.address))
    if sources.comparison:
        run.append(("comparison", sources.comparison.address))
    versions = [(str(name), str(value)) for name, value in record.get("versions", {}).items()]
    return [("Model", model), ("Run", run), ("Versions", versions)]
