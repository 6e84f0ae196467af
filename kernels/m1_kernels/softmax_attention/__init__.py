"""Causal softmax attention over packed documents, and rotary embedding."""
