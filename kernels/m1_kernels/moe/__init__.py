"""Top-k mixture of SwiGLU experts."""
