"""Sends a run's numbers to trackers as well, and never ends a run for their sake."""
