"""What tests share: tiny models, recipes, runs, a Hub double, the matrix."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
