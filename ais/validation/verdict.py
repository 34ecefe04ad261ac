"""Every figure of a validation as a check with an interval, and the verdict in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ais.heatmaps import Weighting
from ais.metrics import Interval
from ais.validation.faithfulness import FILLS, Curves
from ais.validation.intervals import ENOUGH_IMAGES, Mean, Outcome, mean_over_images, mean_over_images_and_heads
from ais.validation.localisation import Localisation
from ais.validation.measure import BASELINES, HeadAgreement, Heatmaps
from ais.validation.protocol import CumulativeCurve
from ais.validation.separation import Separation

_PREDICTS = "head predicts"
_RANKS = "PLCC along random"
_AGREES = "model agrees"
_DELETES_SOONER_THAN = {
    "random": "deleting at random",
    "centre": "deleting from the centre",
    # Without this, heatmaps may show where the backbone answers to anything at all, and nothing of the ratings.
    "random head": "by that of an unfitted head",
}
_ESSENTIAL = {
    _RANKS: "maps added by their AIS beat a random order out of sample",
    **{
        f"deletion {fill} {baseline}": f"deleting by the heatmap ({fill} fill) lowers the score sooner than {other}"
        for fill in FILLS
        for baseline, other in _DELETES_SOONER_THAN.items()
    },
    "pointing chance": "heatmaps point into the masks more often than chance",
    "ais separates random head": "maps with a higher AIS respond more to the masks, more so than for unfitted heads",
}
_ESSENTIAL_FOR_SIMILARITY = {
    _AGREES: "the model's similarity agrees with people's",
    "R² along random": "maps added by their AIS beat a random order out of sample",
}
# Rank correlation with the heatmaps of unfitted heads above which these hardly depend on the head.
_HARDLY_DEPENDS = 0.9


@dataclass(frozen=True)
class Findings:
    """All that was measured on one model.

    Args:
        scores: ``(N,)`` intact, in rating units.
        prediction: agreement of scores with ratings, of `ais.metrics.regression_metrics`.
        protocol: by measure; empty where it was left out.
        protocol_refused: why.
        heatmaps: of every method.
        curves: of deletion and insertion, by fill and method.
        curved: ``(M,)`` which of the N images these are of.
        localisation: by method; empty where there are no masks.
        weighting: of the heatmaps.
        held_out: whether the head's record says that it was not fitted to these images; otherwise that is taken on
            trust.
    """

    scores: np.ndarray
    prediction: dict[str, Interval]
    protocol: dict[str, CumulativeCurve]
    protocol_refused: str | None
    heatmaps: Heatmaps
    curves: dict[str, dict[str, Curves]]
    curved: np.ndarray
    localisation: dict[str, Localisation]
    weighting: Weighting
    held_out: bool


@dataclass(frozen=True)
class SimilarityFindings:
    """All that was measured on the maps of one backbone.

    Args:
        agreement: R of the model's similarity with people's, with all maps.
        protocol: by measure.
    """

    agreement: Mean
    protocol: dict[str, CumulativeCurve]


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
        *_protocol_checks(findings.protocol),
        *_faithfulness_checks(findings),
        *_head_checks(findings.heatmaps.agreement[findings.weighting]),
        *_localisation_checks(findings),
        *_separation_checks(findings.heatmaps.separation),
    ]


def similarity_checks_of(findings: SimilarityFindings) -> list[Check]:
    """The same for the maps of a backbone."""
    claim = f"{_ESSENTIAL_FOR_SIMILARITY[_AGREES]} (R over pairs, jackknife over images)"
    return [Check(_AGREES, claim, findings.agreement), *_protocol_checks(findings.protocol)]


def _prediction_checks(findings: Findings) -> list[Check]:
    plcc = findings.prediction["plcc"]
    mean = Mean.of_images(plcc.value, plcc.low, plcc.high, plcc.n)
    return [Check(_PREDICTS, f"{_prediction_claim(findings)} (PLCC)", mean)]


def _prediction_claim(findings: Findings) -> str:
    seen = "it has not seen" if findings.held_out else "taken as not seen in training"
    return f"the head predicts ratings of images {seen}"


def _protocol_checks(protocol: dict[str, CumulativeCurve]) -> list[Check]:
    checks = []
    for measure, curve in protocol.items():
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


def _heads_of(findings: Findings, method: str) -> np.ndarray | None:
    """Which unfitted head each image's figure of a method is of, ``(N,)``, for those of such heads."""
    return findings.heatmaps.random_head if method == "random head" else None


def _faithfulness_checks(findings: Findings) -> list[Check]:
    checks = []
    for fill, methods in findings.curves.items():
        areas = {method: curves.areas() for method, curves in methods.items()}
        for baseline, meaning in BASELINES.items():
            heads = _heads_of(findings, baseline)
            heads = None if heads is None else heads[findings.curved]
            for mode, sign, what in (("deletion", 1, "lowers the score sooner"), ("insertion", -1, "raises it sooner")):
                lead = sign * (areas[baseline][mode] - areas["ais"][mode])
                claim = f"{mode} by the heatmap, {fill} fill, {what} than by {baseline} ({meaning})"
                checks.append(Check(f"{mode} {fill} {baseline}", claim, mean_over_images(lead, heads)))
    return checks


def _head_checks(found: HeadAgreement) -> list[Check]:
    gap = found.variants - found.random_each
    claim = "heatmaps of the head's variants agree with each other more than with those of random heads (Spearman)"
    return [Check("variants random head", claim, mean_over_images_and_heads(gap))]


def _localisation_checks(findings: Findings) -> list[Check]:
    found = findings.localisation
    if not found:
        return []
    ours = found["ais"]
    # Of a few images that are pointed at by chance alone, likely none is hit: without spread, and yet no proof.
    by_chance = float(np.mean(ours.chance * (1 - ours.chance)))
    lead = mean_over_images(ours.hits - ours.chance, least_variance=by_chance)
    checks = [Check("pointing chance", _ESSENTIAL["pointing chance"], lead)]
    for baseline in BASELINES:
        other, heads = found[baseline], _heads_of(findings, baseline)
        checks += [
            Check(
                f"pointing {baseline}",
                f"heatmaps point into the masks more often than {baseline}",
                mean_over_images(ours.hits - other.hits, heads),
            ),
            Check(
                f"overlap {baseline}",
                f"the top of the heatmap overlaps the mask more than {baseline} (IoU)",
                mean_over_images(ours.overlaps - other.overlaps, heads),
            ),
        ]
    return checks


def _separation_checks(found: Separation | None) -> list[Check]:
    if found is None:
        return []
    return [
        Check(
            "ais separates",
            "maps with a higher AIS respond more to the masks (Spearman over maps)",
            found.correlation(),
        ),
        Check(
            "ais separates random head",
            "maps with a higher AIS respond more to the masks than with the AIS of an unfitted head (Spearman)",
            found.lead(),
        ),
    ]


def conclusion(findings: Findings, checks: list[Check]) -> str:
    """Say in a few sentences what the essential checks come to, and what was shown to the contrary.

    Essential checks of what was not asked for count for nothing either way: a fill that was not measured, and masks
    that were not given. A protocol that was left out does, for without it nothing says that the ranking of the maps
    holds on other images.
    """
    found = next(check.mean for check in checks if check.name == _PREDICTS)
    predicts = _prediction_claim(findings)
    if found.outcome != "shown":
        return (
            f"FAILED: {_not_shown(found, predicts)}. Its heatmaps show what moves this "
            "head, not what people saw, whatever else is shown below: deletion is faithful to any head, and the "
            "protocol, which ranks maps by the ratings, can find some that help in a head that learnt nothing."
        )
    refused = findings.protocol_refused
    left_out = f"the protocol was left out ({refused}), so that nothing says whether {_ESSENTIAL[_RANKS]}"
    return _summary({_PREDICTS: predicts, **_ESSENTIAL}, checks, [left_out] if refused else [])


def similarity_conclusion(checks: list[Check]) -> str:
    """The same for the maps of a backbone."""
    found = next(check.mean for check in checks if check.name == _AGREES)
    if found.outcome != "shown":
        return (
            f"FAILED: {_not_shown(found, _ESSENTIAL_FOR_SIMILARITY[_AGREES])}. Which of its maps add to an "
            "agreement that is not there says nothing, whatever else is shown below."
        )
    return _summary(_ESSENTIAL_FOR_SIMILARITY, checks, [])


def _summary(essential: dict[str, str], checks: list[Check], missing: list[str]) -> str:
    """The verdict on a head that predicts; ``missing`` says what of the essential was not tried at all."""
    required = [(check.mean, essential[check.name]) for check in checks if check.name in essential]
    lacking = [_not_shown(mean, claim) for mean, claim in required if mean.outcome != "shown"] + missing
    if lacking:
        verdict = f"PASSED IN PART: {'; '.join(lacking)}."
    else:
        verdict = f"PASSED: {'; '.join(claim for _, claim in required)}."
    contrary = [check.claim for check in checks if check.outcome == "against" and check.name not in essential]
    if contrary:
        verdict += f" Of this the opposite was shown, though it is not required: {'; '.join(contrary)}."
    return verdict


def _not_shown(mean: Mean, claim: str) -> str:
    """Say of a claim that was not shown how it stands."""
    return {
        "not shown": f"it was not shown that {claim}",
        "against": f"the opposite was shown of this: {claim}",
        "not measured": f"it could not be measured whether {claim}{_too_few(mean)}",
    }[mean.outcome]


def _too_few(mean: Mean) -> str:
    return f" ({mean.n} images are too few)" if 0 < mean.n < ENOUGH_IMAGES else ""


def describe(findings: Findings, checks: list[Check]) -> str:
    """Return the verdict in words: the conclusion, every check under its outcome, and the figures without a claim."""
    lines = [conclusion(findings, checks), "", *_by_outcome(checks), ""]
    lines += [line for weighting, found in findings.heatmaps.agreement.items() for line in _agreement(weighting, found)]
    plain = mean_over_images(findings.heatmaps.plain_correlation)
    lines.append(f"rank correlation of the heatmaps with the unweighted sum of all maps: {_figures(plain)}")
    if note := _head_note(findings):
        lines.append(note)
    if findings.heatmaps.separation is not None:
        random = findings.heatmaps.separation.random_correlations()
        if np.isfinite(random).all():
            lines.append(
                f"AIS and response to the masks, unfitted heads: Spearman {random.mean():.3g} on average, "
                f"{random.min():.3g} to {random.max():.3g}"
            )
    for method, (hits, overlap) in localisation_means(findings).items():
        lines.append(f"masks, {method}: hit rate {_figures(hits)}, IoU {_figures(overlap)}")
    if not findings.held_out:
        lines.append(_ON_TRUST)
    lines.append(_EVERY_INTERVAL)
    return "\n".join(lines)


def localisation_means(findings: Findings) -> dict[str, tuple[Mean, Mean]]:
    """Hit rate and overlap of each method."""
    means = {}
    for method, found in findings.localisation.items():
        heads = _heads_of(findings, method)
        means[method] = mean_over_images(found.hits, heads), mean_over_images(found.overlaps, heads)
    return means


def describe_similarity(checks: list[Check]) -> str:
    """The same for the maps of a backbone."""
    return "\n".join([similarity_conclusion(checks), "", *_by_outcome(checks), "", _EVERY_INTERVAL])


_ON_TRUST = (
    "held_out=false: that the head was not fitted to these images is taken on trust; ratings of "
    "those it was fitted to it predicts better."
)
_EVERY_INTERVAL = "Every interval is 95%, for one check at a time; with many checks some are shown by chance."


def _by_outcome(checks: list[Check]) -> list[str]:
    return [
        f"{outcome:<13}{check.claim}: {_figures(check.mean)}{_too_few(check.mean) if outcome == 'not measured' else ''}"
        for outcome in ("shown", "against", "not shown", "not measured")
        for check in checks
        if check.outcome == outcome
    ]


def _agreement(weighting: str, found: HeadAgreement) -> list[str]:
    random, variants = mean_over_images_and_heads(found.random_each), mean_over_images(found.variants)
    between = "" if np.isnan(variants.value) else f"; between the head's variants: {_figures(variants)}"
    return [f"rank correlation of {weighting} heatmaps with those of unfitted heads: {_figures(random)}{between}"]


def _head_note(findings: Findings) -> str | None:
    """Say why heatmaps hardly depend on the head, where they do not, and what would."""
    random = {
        weighting: mean_over_images_and_heads(found.random_each).value
        for weighting, found in findings.heatmaps.agreement.items()
    }
    if not random[findings.weighting] >= _HARDLY_DEPENDS:  # neither where it is NaN: nothing was measured
        return None
    why = "These heatmaps hardly depend on the head: its positive weights average to what all maps have in common."
    if findings.weighting == "positive" and random["signed"] < _HARDLY_DEPENDS:
        why += (
            " With weighting=signed, maps that lower the score cancel it: there the correlation with unfitted heads is "
            f"{random['signed']:.2f}."
        )
    return why


def _figures(mean: Mean) -> str:
    if np.isnan(mean.value):
        return "undefined"
    ends = "" if np.isnan(mean.low) else f" [{mean.low:.3g}, {mean.high:.3g}]"
    return f"{mean.value:.3g}{ends}"
