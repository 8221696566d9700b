"""The page of a search: what each value came to, the losses of every trial, and the table."""
