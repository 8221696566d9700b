"""Groups of lm-eval's tasks, such as mmlu: their tasks, and their scores."""
