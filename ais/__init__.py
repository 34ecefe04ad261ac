"""Scores and exact alignment-importance heatmaps for image collections.

from ais import Explainer, load_backbone, load_head
explainer = Explainer(load_backbone("resnet152"), load_head("runs/my-head"))
result = explainer(images)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ais.backbones import Backbone, backbone_names, load_backbone
    from ais.errors import AisError
    from ais.explainer import Explainer, Explanation
    from ais.heads import HeadEnsemble, RegressionHead, load_head

__version__ = "0.1.0"

__all__ = [
    "AisError",
    "Backbone",
    "Explainer",
    "Explanation",
    "HeadEnsemble",
    "RegressionHead",
    "__version__",
    "backbone_names",
    "load_backbone",
    "load_head",
]

_HOMES = {
    "AisError": "ais.errors",
    "Backbone": "ais.backbones",
    "Explainer": "ais.explainer",
    "Explanation": "ais.explainer",
    "HeadEnsemble": "ais.heads",
    "RegressionHead": "ais.heads",
    "backbone_names": "ais.backbones",
    "load_backbone": "ais.backbones",
    "load_head": "ais.heads",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `--help` and configuration errors do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ais' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
