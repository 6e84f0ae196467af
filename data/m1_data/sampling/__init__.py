"""Prepared data to training rows: mix, packing, needle documents, loader."""
