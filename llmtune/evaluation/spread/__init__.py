"""Evaluation over several processes, each with the whole model and a part of the questions."""
