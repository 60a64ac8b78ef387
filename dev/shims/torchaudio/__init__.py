"""Stands in for torchaudio, which pictures never need; a real one comes first on the path."""

import sys
import types


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)

    def attribute(member: str) -> type:
        if member.startswith("__"):
            raise AttributeError(member)

        def refuse(self, *args, **kwargs):
            raise RuntimeError(f"{name}.{member}: torchaudio is not installed here")

        return type(member, (), {"__init__": refuse})

    module.__getattr__ = attribute  # type: ignore[method-assign]
    sys.modules[name] = module
    return module


functional = _module("torchaudio.functional")
transforms = _module("torchaudio.transforms")
__version__ = "0"


def __getattr__(member: str) -> None:
    if member.startswith("__"):
        raise AttributeError(member)
    raise AttributeError(f"torchaudio.{member}: torchaudio is not installed here")
