"""One arm at a share of the rows: its search, its trainings, and what they reached."""
