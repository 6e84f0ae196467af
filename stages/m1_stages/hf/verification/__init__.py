"""Compares what a loader computes from an export with the model that was trained, one model in memory at a time."""
