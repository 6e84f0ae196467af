"""Conversations to rows for fine-tuning: templates, encoding, loss masks."""
