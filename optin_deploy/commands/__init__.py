"""The commands: each parses, calls one function, and prints. They alone look at `exporters`, inside functions."""
