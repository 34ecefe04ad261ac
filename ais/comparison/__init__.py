"""Complete runs over the same images, compared heatmap by heatmap."""

from ais.comparison.pairs import MeanAgreement, PairAgreement, compare, mean_agreement
from ais.comparison.report import describe_pairs, describe_runs, write_report
from ais.comparison.sources import ComparedRun, RunHeatmaps, open_runs, read_heatmaps

__all__ = [
    "ComparedRun",
    "MeanAgreement",
    "PairAgreement",
    "RunHeatmaps",
    "compare",
    "describe_pairs",
    "describe_runs",
    "mean_agreement",
    "open_runs",
    "read_heatmaps",
    "write_report",
]
