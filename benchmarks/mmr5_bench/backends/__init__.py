"""Our engines and ``transformers`` on a CPU: prompts, decode steps, whole reranks."""
