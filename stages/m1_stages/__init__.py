"""What a training stage is and how one runs. Importing this package imports no torch."""
