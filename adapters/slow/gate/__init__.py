"""The gate: whether a candidate is proven better than what serves."""
