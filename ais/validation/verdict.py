"""Every figure of a validation as a check with an interval, and the verdict in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ais.metrics import Interval
from ais.validation.faithfulness import FILLS
from ais.validation.intervals import Mean, Outcome, bootstrap_mean
from ais.validation.localisation import Localisation
from ais.validation.measure import BASELINES, Faithfulness
from ais.validation.protocol import CumulativeCurve

_PREDICTS = "head predicts"
_ESSENTIAL = {
    _PREDICTS: "the head predicts ratings of images it has not seen",
    "PLCC along random": "maps added by their AIS beat a random order out of sample",
    "deletion blurred random": "deleting by the heatmap lowers the score sooner than deleting at random",
    "deletion blurred centre": "deleting by the heatmap lowers the score sooner than deleting from the centre",
    # Without this, heatmaps may show where the backbone answers to anything at all, and nothing of the ratings.
    "deletion blurred random head": "deleting by the heatmap lowers the score sooner than by that of an unfitted head",
    "pointing chance": "heatmaps point into the masks more often than chance",
}


@dataclass(frozen=True)
class Findings:
    """All that was measured on one model.

    Args:
        scores: ``(N,)`` intact, in rating units.
        prediction: agreement of scores with ratings, of `ais.metrics.regression_metrics`.
        protocol: by measure; empty where it was refused.
        protocol_refused: why.
        faithfulness: heatmaps and curves.
        localisation: by method; empty where there are no masks.
    """

    scores: np.ndarray
    prediction: dict[str, Interval]
    protocol: dict[str, CumulativeCurve]
    protocol_refused: str | None
    faithfulness: Faithfulness
    localisation: dict[str, Localisation]


@dataclass(frozen=True)
class Check:
    """One claim and what the data say.

    Args:
        name: short and unique.
        claim: what is shown if the interval lies above zero.
        mean: the figure, positive where it speaks for the claim.
    """

    name: str
    claim: str
    mean: Mean

    @property
    def outcome(self) -> Outcome:
        """Shown, not shown or against, by whether the 95% interval holds zero."""
        return self.mean.outcome

    def as_dict(self) -> dict[str, Any]:
        """Return name, claim, outcome and figure as JSON values."""
        return {"name": self.name, "claim": self.claim, "outcome": self.outcome, **self.mean.as_dict()}


def checks_of(findings: Findings) -> list[Check]:
    """Turn findings into checks, the most telling first."""
    return [
        *_prediction_checks(findings),
        *_protocol_checks(findings),
        *_faithfulness_checks(findings.faithfulness),
        *_head_checks(findings.faithfulness),
        *_localisation_checks(findings.localisation),
    ]


def _prediction_checks(findings: Findings) -> list[Check]:
    plcc = findings.prediction["plcc"]
    mean = Mean(plcc.value, plcc.low, plcc.high, plcc.n)
    return [Check(_PREDICTS, f"{_ESSENTIAL[_PREDICTS]} (PLCC)", mean)]


def _protocol_checks(findings: Findings) -> list[Check]:
    checks = []
    for measure, curve in findings.protocol.items():
        checks += [
            Check(
                f"{measure} along random",
                f"maps added by their AIS beat a random order out of sample, over the whole curve ({measure})",
                curve.gain_along("random"),
            ),
            Check(
                f"{measure} along reversed",
                f"maps added by their AIS beat the reversed order out of sample, over the whole curve ({measure})",
                curve.gain_along("reversed"),
            ),
            Check(
                f"{measure} stop random",
                f"where they stop, the top maps by AIS beat a random order with the same rule ({measure})",
                curve.gain_over("random"),
            ),
            Check(
                f"{measure} stop all",
                f"where they stop, the top maps by AIS do better than all maps ({measure})",
                curve.gain_over_all(),
            ),
        ]
    return checks


def _faithfulness_checks(found: Faithfulness) -> list[Check]:
    checks = []
    for fill in FILLS:
        areas = {method: curves.areas() for method, curves in found.curves[fill].items()}
        for baseline, meaning in BASELINES.items():
            for mode, sign, what in (("deletion", 1, "lowers the score sooner"), ("insertion", -1, "raises it sooner")):
                lead = sign * (areas[baseline][mode] - areas["ais"][mode])
                claim = f"{mode} by the heatmap, {fill} fill, {what} than by {baseline} ({meaning})"
                checks.append(Check(f"{mode} {fill} {baseline}", claim, bootstrap_mean(lead)))
    return checks


def _head_checks(found: Faithfulness) -> list[Check]:
    gap = found.variant_correlation - found.random_head_correlation
    claim = "heatmaps of the head's variants agree with each other more than with those of random heads (Spearman)"
    return [Check("variants random head", claim, bootstrap_mean(gap))]


def _localisation_checks(found: dict[str, Localisation]) -> list[Check]:
    if not found:
        return []
    ours = found["ais"]
    checks = [
        Check("pointing chance", _ESSENTIAL["pointing chance"], bootstrap_mean(ours.hits - ours.chance)),
    ]
    for baseline in BASELINES:
        other = found[baseline]
        checks += [
            Check(
                f"pointing {baseline}",
                f"heatmaps point into the masks more often than {baseline}",
                bootstrap_mean(ours.hits - other.hits),
            ),
            Check(
                f"overlap {baseline}",
                f"the top of the heatmap overlaps the mask more than {baseline} (IoU)",
                bootstrap_mean(ours.overlaps - other.overlaps),
            ),
        ]
    return checks


def conclusion(findings: Findings, checks: list[Check]) -> str:
    """Say in a few sentences what the essential checks come to."""
    outcomes = {check.name: check.outcome for check in checks}
    if outcomes[_PREDICTS] != "shown":
        return (
            "FAILED: the head was not shown to predict ratings of images it has not seen. Its heatmaps show what moves "
            "this head, not what people saw, whatever else is shown below."
        )
    missing = [claim for name, claim in _ESSENTIAL.items() if outcomes.get(name, "shown") != "shown"]
    left_out = [f" The protocol was left out: {findings.protocol_refused}."] if findings.protocol_refused else []
    if not missing:
        shown = [claim for name, claim in _ESSENTIAL.items() if name in outcomes]
        return f"PASSED: {'; '.join(shown)}.{''.join(left_out)}"
    return f"PASSED IN PART: it was not shown that {'; nor that '.join(missing)}.{''.join(left_out)}"


def describe(findings: Findings, checks: list[Check]) -> str:
    """Return the verdict in words: the conclusion, every check under its outcome, and the figures without a claim."""
    lines = [conclusion(findings, checks), ""]
    for outcome in ("shown", "against", "not shown", "not measured"):
        chosen = [check for check in checks if check.outcome == outcome]
        lines += [f"{outcome:<13}{check.claim}: {_figures(check.mean)}" for check in chosen]
    correlation = bootstrap_mean(findings.faithfulness.random_head_correlation)
    lines += ["", f"rank correlation of the heatmaps with those of random heads: {_figures(correlation)}"]
    for method, found in findings.localisation.items():
        hits, overlap = bootstrap_mean(found.hits), bootstrap_mean(found.overlaps)
        lines.append(f"masks, {method}: hit rate {_figures(hits)}, IoU {_figures(overlap)}")
    lines.append("Every interval is 95%, for one check at a time; with many checks some are shown by chance.")
    return "\n".join(lines)


def _figures(mean: Mean) -> str:
    if np.isnan(mean.value):
        return "undefined"
    ends = "" if np.isnan(mean.low) else f" [{mean.low:.3g}, {mean.high:.3g}]"
    return f"{mean.value:.3g}{ends}"
