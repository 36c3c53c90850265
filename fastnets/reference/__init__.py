"""Every operator in plain, differentiable PyTorch: the definition of what each one means, on any device and dtype."""
