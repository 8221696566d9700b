"""The formats of rows, recognised by their columns: a new one is a file here and a line in `registry.py`."""
