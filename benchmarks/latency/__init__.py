"""Can the measured milliseconds be trusted: the protocol, the latency table, and budgets in time."""
