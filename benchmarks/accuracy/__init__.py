"""Accuracy after pruning without retraining, beside other methods, on the same rows in one run."""
