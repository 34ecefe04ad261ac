"""Frozen vision backbones: records, weights, and the cut at a layer."""

from ais.backbones.loading import (
    Backbone,
    LayerInfo,
    embedding_fingerprint,
    inspect_layer,
    load_backbone,
    preprocessing_fingerprint,
)
from ais.backbones.registry import backbone_names, get_spec, register
from ais.backbones.spec import BackboneSpec, PublishedWeights, TailKind
from ais.backbones.weights import Weights, resolve_weights

__all__ = [
    "Backbone",
    "BackboneSpec",
    "LayerInfo",
    "PublishedWeights",
    "TailKind",
    "Weights",
    "backbone_names",
    "embedding_fingerprint",
    "get_spec",
    "inspect_layer",
    "load_backbone",
    "preprocessing_fingerprint",
    "register",
    "resolve_weights",
]
