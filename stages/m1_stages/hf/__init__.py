"""Writes and verifies Hugging Face checkpoints: tensor names, configuration, safetensors, verification."""
