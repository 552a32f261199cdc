"""Reports of a recording, a session or an analysis, and the comparison of two recordings; docs/report.md.

    report = moe_debugger.report(moe_debugger.open_recording("runs/today"))
    Path("today.html").write_text(report.to_html())

    difference = moe_debugger.diff(moe_debugger.open_recording("a"), moe_debugger.open_recording("b"))
    print(difference.verdict)

What is said (`content`, `building`, `comparing`) is apart from how it looks (`html`, `svg`).
"""

from moe_debugger.reporting.building import Report, report
from moe_debugger.reporting.comparing import Diff, diff

__all__ = ["Diff", "Report", "diff", "report"]
