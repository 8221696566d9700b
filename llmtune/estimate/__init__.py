"""What a run will take, from a model without weights: memory, time, and which card it fits."""
