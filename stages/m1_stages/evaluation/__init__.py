"""Long-range measurements of a model, and their results."""
