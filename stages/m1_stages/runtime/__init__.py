"""The runtime of a training process: device, process groups, collectives, optimizer, watchdog, signals."""
