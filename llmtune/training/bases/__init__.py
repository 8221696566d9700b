"""The models that a run is made of: its base, what it goes on from, and what it is merged into."""
