"""The run's own held-out rows: what is asked, what an answer is compared with, and the loss of plain texts."""
