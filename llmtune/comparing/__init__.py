"""compare(recipe): methods side by side on the same rows, each for its share of the minutes."""
