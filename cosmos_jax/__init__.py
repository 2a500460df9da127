"""Cosmos 3 in JAX: an omnimodal world model, from packed batch to media."""
