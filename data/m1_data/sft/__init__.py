"""Rows for fine-tuning: conversations encoded once, kept on the disk, selected and packed."""
