"""moe_debugger."""
