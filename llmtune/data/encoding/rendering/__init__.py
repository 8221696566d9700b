"""What a chat template makes of the parts of a row."""
