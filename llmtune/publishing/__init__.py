"""The model card, the Hub, and what may go there."""
