"""The error that speaks to the person at the graph."""


class LoraError(ValueError):
    """What is wrong, where, and what to do, in words for the person who runs the graph."""
