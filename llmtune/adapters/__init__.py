"""What the parameters are: one file a kind, inserted where a plan trains, saved as a delta."""
