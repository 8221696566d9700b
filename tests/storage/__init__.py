"""Runs on a store."""
