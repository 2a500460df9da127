"""Kernels and their slow, obvious, right references. Imports jax only."""
