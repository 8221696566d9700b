"""vLLM in the place of transformers: the same prompts, by token ids, and what vLLM answers to them."""
