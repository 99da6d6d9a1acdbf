"""Documents to token rows: sources, tokenizers, packing, and the train / held-out split."""
