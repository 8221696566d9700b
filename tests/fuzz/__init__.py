"""Inputs that nobody writes on purpose, by the thousand; and trainings killed at any moment."""
