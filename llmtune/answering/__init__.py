"""Answers of a run's base and tuned model: to rows of a file, in batches, and to the lines of a chat."""
