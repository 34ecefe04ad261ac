"""Runs a job with the backbone ``tiny`` registered: ``python tests/run_tiny.py jobs/heatmaps.py key=value …``."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    importlib.import_module("tests.tiny")
    del sys.argv[0]
    job = importlib.import_module(f"jobs.{Path(sys.argv[0]).stem}")
    importlib.import_module("ais.command_line").run_job(job.main)
