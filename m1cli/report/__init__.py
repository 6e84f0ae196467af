"""Writes one self-contained HTML page about a run, from ``metrics.jsonl`` and the data manifest alone."""
