"""Which checkpoint is the result: the best one by validation, and when waiting for a better one ends."""
