"""Base and delta as full weights, with the proof that they are the tuned model."""
