"""A step of a training in passes: how large they are, and how they become one update of the weights."""
