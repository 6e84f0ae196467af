"""Bytes to documents, token ids and packed samples, in a deterministic order."""
