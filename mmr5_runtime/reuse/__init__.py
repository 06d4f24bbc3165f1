"""What is computed once and used again: page embeddings, segment KV and, opt-in, moved pages."""
