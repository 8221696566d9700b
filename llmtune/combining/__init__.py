"""Several deltas of one base as one, with the proof that it is their combination."""
