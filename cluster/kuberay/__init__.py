"""Manifests for KubeRay, and what checks them."""
