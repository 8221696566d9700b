"""Where arms and trials run: one after another here, one on each GPU, or on the machines of a Ray cluster."""
