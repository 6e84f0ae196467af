"""Reads a Hugging Face checkpoint of this family: configuration, index, tensors, one at a time."""
