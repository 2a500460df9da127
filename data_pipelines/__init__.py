"""Everything before the device: samples, tokens, positions, packing. NumPy and grain only; never imports jax."""
