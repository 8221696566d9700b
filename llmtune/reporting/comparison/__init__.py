"""Pages that stand side by side what was trained: the arms of a comparison, or several runs."""
