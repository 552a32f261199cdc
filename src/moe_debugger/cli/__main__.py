"""`python -m moe_debugger.cli`."""

from moe_debugger.cli import main

main()
