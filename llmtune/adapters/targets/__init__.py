"""Which layers and tensors an adapter goes to, and what it leaves."""
