"""One training process: start-up, loop, step, optimizer, signals, events."""
