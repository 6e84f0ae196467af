"""One module per command; each does the talking, the work is in the rooms below."""
