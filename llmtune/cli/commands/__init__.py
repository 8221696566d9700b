"""The commands: one function each; whatever is heavy is imported inside the function that needs it."""
