"""The base model: where it lies, its blocks and MLPs, 4-bit layers, sharded weights."""
