"""Models of a true shape without their weights: config, tokenizer, tensors, a checkpoint folder."""
