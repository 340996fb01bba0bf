"""The paper's evaluation: metrics as pure functions, one task a benchmark, and what runs them on a model."""
