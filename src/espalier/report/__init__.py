"""Pages to look at: what studies found, what runs did, what weights look like."""

from espalier.report.page import write_report, write_weight_pictures

__all__ = ["write_report", "write_weight_pictures"]
