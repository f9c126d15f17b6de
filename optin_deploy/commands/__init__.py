"""The commands: each parses, calls one function, and prints. They and the pytest plugin alone look at `exporters`."""
