"""Raw text to clean, deduplicated, tokenized shards."""
