"""Neural network, processor and checkpoints (paper section 3.1)."""
