"""One small read-only language over sessions and recordings; docs/query.md describes it.

session.query("experts where layer = 23 and load > 8x order by load desc")
recording.query("tokens where layer = 3 and expert = 5 limit 20")
"""

from moe_debugger.errors import QueryCostError, QueryError
from moe_debugger.query.columns import SUBJECTS, ColumnSpec, Kind, Subject
from moe_debugger.query.engine import QuerySource, execute, run_query
from moe_debugger.query.form import Query, unparse
from moe_debugger.query.limits import FLEET_LIMITS, LOCAL_LIMITS, Limits
from moe_debugger.query.parser import parse
from moe_debugger.query.result import QueryResult, ResultColumn

__all__ = [
    "FLEET_LIMITS",
    "LOCAL_LIMITS",
    "SUBJECTS",
    "ColumnSpec",
    "Kind",
    "Limits",
    "Query",
    "QueryCostError",
    "QueryError",
    "QueryResult",
    "QuerySource",
    "ResultColumn",
    "Subject",
    "execute",
    "parse",
    "run_query",
    "unparse",
]
