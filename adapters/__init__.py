"""What changes a model: ``fast`` at test time and reversibly, ``slow`` in its parameters.

Knows torch and nothing of the daemon, so that each method is usable alone: ``Tent(model)(x)``.
"""
