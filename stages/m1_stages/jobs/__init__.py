"""One module per command: pretrain, sft, evaluate, export. ``prepared`` opens their data."""
