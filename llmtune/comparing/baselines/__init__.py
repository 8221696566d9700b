"""What is reached without the training of the recipe's base."""
