"""What happened to a guarded run: for the log, terminals, notebooks, and as JSON, HTML and PNG."""

from oomguard.report.record import (
    REPORT_NAME,
    SCHEMA,
    Recovery,
    Report,
    Status,
    installed_versions,
)

__all__ = ["REPORT_NAME", "SCHEMA", "Recovery", "Report", "Status", "installed_versions"]
