"""What parts and tools share: models, rows, one training of llmtune, and its clock."""
