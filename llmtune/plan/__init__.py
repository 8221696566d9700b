"""What trains when, at which rate: pure values and functions."""
