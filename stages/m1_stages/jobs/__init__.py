"""One module per command: pretrain, sft, evaluate, export."""
