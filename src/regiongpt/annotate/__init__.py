"""Detailed captions of regions by the million: two stages, any model, filtered, safe against a kill (paper §3.3)."""
