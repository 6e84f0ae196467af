"""Linear cross-entropy with fp32 logits in chunks."""
