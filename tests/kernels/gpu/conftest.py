"""The simulator of Hopper runs three warpgroups at once, and each holds a thread of XLA while it waits."""

import os

os.environ.setdefault("NPROC", "8")  # threads of XLA on a CPU: with one per core, two cores wait for each other forever
