"""Files of prepared data: Megatron shards, manifest, compressed streams."""
