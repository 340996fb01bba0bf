"""Training: recipes, the feature cache and the stages (paper sections 3.2 and 4)."""
