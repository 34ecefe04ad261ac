"""What the colours of a run's heatmaps stand for: that depends on what the importance of its maps was measured by."""

from __future__ import annotations

from dataclasses import dataclass

from ais.report.formats import counted
from ais.report.sources import Importance, Sources


@dataclass(frozen=True)
class Meaning:
    """What feature maps with positive and with negative importance do, in words.

    Args:
        adds: what a map with positive importance does, ``"raises the score"``.
        add: what several do, ``"raise the score"``.
        takes: what a map with negative importance does.
        take: what several do.
        ranking: what else is to be known of one importance for all images; empty where each image has its own.
    """

    adds: str
    add: str
    takes: str
    take: str
    ranking: str = ""

    def where(self, weighting: str) -> str:
        """Where the colours lie; goes on from "the colours lie"."""
        signed = weighting == "signed"
        if not self.ranking:
            colours = f" (red {self.adds}, blue {self.takes})" if signed else ""
            return f"where the evidence for the score is{colours}"
        blue = f" (red) or {self.take} (blue)" if signed else ""
        return f"where feature maps answer that {self.add}{blue}"

    @property
    def blue(self) -> str:
        """What a negative cell is; goes on from the place where it is."""
        return f", of maps that {self.take}" if self.ranking else f" and {self.takes}"


_OWN = Meaning("raises the score", "raise the score", "lowers the score", "lower the score")
AGAINST_PEOPLE = (
    "the model finds those images alike that the matrix gives small numbers. Larger numbers of the matrix must mean "
    "more alike; it may hold distances. If it does not, model and people disagree."
)
_UNKNOWN = Meaning(
    "has positive importance",
    "have positive importance",
    "has negative importance",
    "have negative importance",
    "What importance was measured by is not known here: the bundle that the run was made with was not found. Give it "
    "as importance=[DIR].",
)


def is_against_people(bundle: Importance) -> bool:
    """Whether the model's similarities and people's run against each other, as far as the bundle says."""
    correlation = bundle.record.get("correlation")
    value = correlation.get("value") if isinstance(correlation, dict) else None
    return isinstance(value, int | float) and value <= 0


def meaning_of(sources: Sources) -> Meaning:
    """What the colours of the run's heatmaps stand for."""
    if sources.record["identity"].get("importance") is None:
        return _OWN
    bundle = sources.run_importance
    return _of_ranking(bundle) if bundle else _UNKNOWN


def _of_ranking(bundle: Importance) -> Meaning:
    objective = str(bundle.record["objective"])
    over = f" over {counted(int(bundle.record['images']), 'image')}" if "images" in bundle.record else ""
    measured = f"It was measured{over} (objective {objective}): "
    if objective == "prediction":
        return Meaning(
            "raises the score on average",
            "raise the score on average",
            "lowers the score on average",
            "lower the score on average",
            measured + "in a single image, the same maps may do the opposite.",
        )
    if objective == "error":
        return Meaning(
            "brings predictions nearer to the ratings",
            "bring predictions nearer to the ratings",
            "takes predictions away from the ratings",
            "take predictions away from the ratings",
            measured + "it is about errors, and what is bright may raise or lower the score of its image.",
        )
    if objective == "similarity" and is_against_people(bundle) and bundle.record.get("level") == "collective":
        return Meaning(
            "adds to R², here of a disagreement with people",
            "add to R², here of a disagreement with people",
            "takes from R², here of a disagreement with people",
            "take from R², here of a disagreement with people",
            measured + "R² leaves out the sign of R, and R is not positive.",
        )
    if objective == "similarity":
        return Meaning(
            "adds to the agreement with people",
            "add to the agreement with people",
            "takes from the agreement with people",
            "take from the agreement with people",
            measured + "it is about which images people find alike; neither the head nor the score has a part in it.",
        )
    return _UNKNOWN
