"""Rows and their encoding as Arrow tables: in memory where they are few, else on disk and mapped."""
