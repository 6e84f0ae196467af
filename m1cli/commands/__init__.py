"""Holds one module per command. A command prints; the packages below do the work."""
