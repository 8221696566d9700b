"""Rows as token ids with labels: rendered with the chat template, found in the text, tokenized."""
