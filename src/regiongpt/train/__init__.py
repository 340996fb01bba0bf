"""Training: recipes, their two stages and the loop (paper sections 3.2 and 4)."""
