"""The error that speaks to the person at the graph."""


class LoraError(ValueError):
    """What is wrong, where, and what to do, in words for the person who runs the graph."""

    __module__ = "lora2"  # ComfyUI shows it; the real one begins with the path of the pack's folder

    def __init_subclass__(cls) -> None:
        cls.__module__ = LoraError.__module__
