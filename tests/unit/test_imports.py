"""What an import costs and does not need: fresh interpreters, nothing faked."""

import subprocess
import sys

import pytest


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_the_library_needs_no_ray() -> None:
    modules = loaded("from ais import Explainer, HeadEnsemble, RegressionHead, load_backbone, load_head")
    assert "torch" in modules
    # torchvision takes as long to import as torch: it waits until one of its networks is built.
    assert not modules & {"ray", "s3fs", "pandas", "torchvision"}


def test_import_ais_alone_is_light() -> None:
    assert not loaded("import ais, ais.command_line") & {"ray", "torch", "pyarrow"}


def test_what_reads_renders_and_writes_does_not_wait_for_torch() -> None:
    modules = [f"ais.pipeline.{name}" for name in ("sink", "render", "fetch", "manifest")]
    assert "torch" not in loaded(f"import {', '.join(modules)}")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import ais

    with pytest.raises(AttributeError, match="no attribute 'explain'"):
        ais.explain  # noqa: B018
