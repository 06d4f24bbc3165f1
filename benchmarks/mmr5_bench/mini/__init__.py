"""Mini: shape, tokenizer and training of the embedded checkpoint."""
