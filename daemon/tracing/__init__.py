"""Traces: the context that comes with records and goes on with their answers, and spans of what the loop does.

Nothing here is imported by the loop: where traces are wanted another loop is built (`daemon.tracing.loops`), and the
plain one has no branch for them.
"""
