"""Rows answered in batches by base and tuned model, to a file."""
