"""A table-top seen from above: pucks, a gripper, sound. Deterministic functions of a seed."""
