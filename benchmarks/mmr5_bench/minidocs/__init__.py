"""MiniDocs: a deterministic generator of synthetic document pages and listwise rerank questions."""
