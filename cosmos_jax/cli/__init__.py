"""The command line, in parts: words → options (options.py), commands that make things (make.py), `show` (show.py)."""
