"""Lightning attention: reference, chunked, Triton; context parallelism; decoding."""
