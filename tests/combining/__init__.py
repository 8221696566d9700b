"""Tests of the combination of runs."""
