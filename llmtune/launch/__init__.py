"""Processes: the command line that trains, and the children that it starts."""
