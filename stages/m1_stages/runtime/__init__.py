"""What a training process runs on: device, process groups, collectives, optimizer, watchdog, signals."""
