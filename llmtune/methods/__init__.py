"""Methods as a recipe names them: each gives the plan for a model."""
