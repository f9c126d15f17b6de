"""Comparisons and long evaluations, run by hand from the checkout; results are committed with their environment."""
