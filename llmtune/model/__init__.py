"""The base model: its location, blocks, MLPs, 4-bit layers and sharded weights."""
