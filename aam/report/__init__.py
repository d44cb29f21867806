"""What a person looks at after a run: one self-contained HTML page."""

from aam.report.page import write_report

__all__ = ["write_report"]
