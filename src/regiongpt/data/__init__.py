"""Training data: annotation files, the facts provable from them, and conversations sampled from the facts."""
