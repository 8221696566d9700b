"""Searches for the values of a recipe: Optuna studies that an interrupted search goes on with."""
