"""Math on tensors. Knows nothing of Megatron, of configurations or of this project."""
