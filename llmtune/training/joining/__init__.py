"""Rows of a batch joined into one without padding, once a comparison shows that a model keeps them apart."""
