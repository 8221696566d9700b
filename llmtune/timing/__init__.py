"""How long a training takes: predicted before it begins, and beside what was measured."""
