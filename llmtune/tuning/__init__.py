"""tune(recipe): values of any keys of a recipe, searched by the validation loss."""
