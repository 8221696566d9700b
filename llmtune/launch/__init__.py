"""Training processes: the command line that starts them, and the children that run it."""
