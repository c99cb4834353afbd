"""Training: the loop, and what it is made of. It knows numbers, functions and tensors, and no recipe."""
