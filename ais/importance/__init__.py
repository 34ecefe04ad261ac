"""Alignment-importance scores of feature maps over whole sets of images."""

from ais.importance.bundle import (
    ImportanceRecord,
    load_importance,
    load_importance_by_image,
    save_importance,
)

__all__ = ["ImportanceRecord", "load_importance", "load_importance_by_image", "save_importance"]
