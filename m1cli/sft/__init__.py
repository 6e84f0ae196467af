"""Shows the conversations of a fine-tuning: in a run, in its report, and before it (``m1 sft --dry-run``)."""
