"""Advice before anything trains: what each method takes, what fits, and what is known of such data."""
