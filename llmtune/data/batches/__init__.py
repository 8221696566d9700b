"""Examples as batches: their order, the passes of a step, padding."""
