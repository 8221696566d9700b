"""Rows that are nearly the same as other rows, by MinHash: inside train, and across its splits and the suite."""
