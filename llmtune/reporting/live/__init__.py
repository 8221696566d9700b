"""The page of what goes on, served to the browsers of this machine alone."""
