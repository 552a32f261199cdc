"""Generated protobuf and gRPC code of package ``moe_debugger.v1`` (see ``make proto``)."""
