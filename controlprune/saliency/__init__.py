"""Gradients and loss of the running training -> a value for every unit."""
