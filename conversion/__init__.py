"""Two-way conversion between PyTorch checkpoints and this project's parameters."""
