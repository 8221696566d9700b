"""Base and tuned model on the same questions."""
