"""Arms of a comparison: overrides of one recipe by name, what was measured of each, and what that says."""
