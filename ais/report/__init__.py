"""A run as a folder of static pages: from disk or a bucket, with no server, no network and no scripts of others."""

from ais.report.site import write_report
from ais.report.sources import Sources, open_sources
from ais.report.writer import Report

__all__ = ["Report", "Sources", "open_sources", "write_report"]
