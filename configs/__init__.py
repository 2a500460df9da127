"""ml_collections config files. Each opens with what it trains, where, how long, what to expect, and the command."""
