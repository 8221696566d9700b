"""What a stage of a plan changes: which tensors learn, in which optimizer groups, and what processes reduce."""
