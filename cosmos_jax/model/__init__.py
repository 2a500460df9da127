"""The network. NNX modules declare it; `cosmos.py` offers it as pure functions of `params`."""
