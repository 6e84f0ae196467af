"""RMSNorm of a weighted sum."""
