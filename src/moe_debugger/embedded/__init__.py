"""The fleet on one machine, as `moe-debugger up` runs it: servers, child processes, ports, lock and wiring."""
