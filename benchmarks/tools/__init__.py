"""The tools that the bench compares: how each is told what to train, and how it trains it."""
