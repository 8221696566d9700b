"""Training: a plan followed by transformers' Trainer, with checkpoints, progress and proof."""
