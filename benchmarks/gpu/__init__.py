"""The GPU suite: dense and pruned transformers side by side in many engines. Run: `python -m benchmarks.gpu --help`."""
