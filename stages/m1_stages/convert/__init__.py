"""To and from the tensor names and configuration of the released models."""
