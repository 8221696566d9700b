"""What a training cost: a small fixed set of general questions and texts, asked of base and tuned model."""
