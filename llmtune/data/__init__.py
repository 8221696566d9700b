"""Rows of a user's data -> checked, masked, tokenised examples."""
