"""A node pack of somebody else, for tests: a node that gives any value to any input, and one that takes any."""

import json
import math

import torch


class AnyType(str):
    """Equal to every type, as many packs have it."""

    def __ne__(self, other):
        return False


class Mock:
    """An object of no known kind."""


OBJECTS = {
    "tensor": lambda: torch.zeros(2, 2),
    "bytes": lambda: b"bytes",
    "set": lambda: {1, 2},
    "object": Mock,
    "class": lambda: Mock,
    "function": lambda: math.sqrt,
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "huge": lambda: 10**400,
    "complex": lambda: 1j,
    "surrogate": lambda: "\ud800",
    "table of numbers": lambda: {1: 2, None: 3},
    "lora of texts": lambda: {"a.lora_up.weight": "text"},
    "lora of numbers": lambda: {5: torch.zeros(1)},
    "lora of NaN": lambda: {"a.lora_up.weight": torch.full((2, 2), math.nan), "a.lora_down.weight": torch.zeros(2, 2)},
    "latent of texts": lambda: {"samples": "text"},
    "latent of nothing": dict,
    "conditioning of numbers": lambda: [[1, {}]],
    "conditioning of nothing": lambda: [[None, {}]],
    "a scalar as text": lambda: [[torch.tensor(1.0), {}]],
    "whole numbers as text": lambda: [[torch.ones(1, 3, 768, dtype=torch.int64), {}]],
    "whole numbers as latent": lambda: {"samples": torch.ones(1, 4, 8, 8, dtype=torch.int64)},
    "complex latent": lambda: {"samples": torch.ones(1, 4, 8, 8, dtype=torch.complex64)},
    "sparse latent": lambda: {"samples": torch.ones(1, 4, 8, 8).to_sparse()},
}


class Anything:
    """`json` as a value; or one of OBJECTS, by its name."""

    RETURN_TYPES = (AnyType("*"),)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"json": ("STRING", {"default": "0"}), "name": ("STRING", {"default": ""})}}

    def run(self, json, name):
        return (OBJECTS[name]() if name else _loads(json),)


class AnyList(Anything):
    """The same, as a list of values."""

    OUTPUT_IS_LIST = (True,)


class Take:
    """The end of a graph."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    CATEGORY = "test"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (AnyType("*"), {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, value):
        return {"ui": {"text": [type(value).__name__]}}


_loads = json.loads
NODE_CLASS_MAPPINGS = {"TestAnything": Anything, "TestAnyList": AnyList, "TestTake": Take}
