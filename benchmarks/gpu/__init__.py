"""The GPU check: what anyone with one card runs in ten minutes, offline; `correct` and `speed` print and write JSON."""
