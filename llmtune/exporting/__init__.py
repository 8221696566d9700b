"""The tuned model as files for other programs, with the proof that they answer as it does."""
