"""One small read-only language over sessions and recordings; docs/query.md describes it.

session.query("experts where layer = 23 and load > 8x order by load desc")
recording.query("tokens where layer = 3 and expert = 5 limit 20")
"""

from moe_debugger.query.columns import SUBJECTS
from moe_debugger.query.form import Query, unparse
from moe_debugger.query.parser import parse

__all__ = ["SUBJECTS", "Query", "parse", "unparse"]
