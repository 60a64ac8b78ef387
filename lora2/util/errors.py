"""The error whose message is shown to the user."""


class LoraError(ValueError):
    """An error whose message tells the user the problem, its place and the remedy."""

    __module__ = "lora2"  # ComfyUI shows the module; the real one begins with the path of the pack's folder

    def __init_subclass__(cls) -> None:
        cls.__module__ = LoraError.__module__
