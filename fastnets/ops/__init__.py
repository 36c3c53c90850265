"""The operator families: validation, choice of a backend, autograd. One file a family."""
