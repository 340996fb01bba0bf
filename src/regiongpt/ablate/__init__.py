"""Ablations: the variants of one part of a model trained alike, scored alike, and set side by side."""
