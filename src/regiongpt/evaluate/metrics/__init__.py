"""Metrics: pure functions of answers and truths, each with its rule for what cannot be read."""
