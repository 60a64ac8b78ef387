"""LoRA² for ComfyUI: train a LoRA whose every layer learns its own rank, load it, and see what was learned."""

from __future__ import annotations

from typing import Any

from .nodes.comfy.versions import incompatibility_message

try:
    from comfy_api.latest import ComfyExtension, io

    from .nodes import inspect_ranks as inspect
    from .nodes import load, score, train
except Exception as error:
    raise ImportError(incompatibility_message(error)) from error  # ComfyUI prints it, leaves the pack out, and goes on

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


class LoRA2Extension(ComfyExtension):
    """The pack's four nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of their use."""
        nodes: list[type[Any]] = [*train.NODES, *load.NODES, *inspect.NODES, *score.NODES]
        try:
            for node in nodes:
                node.define_schema()
        except Exception as error:
            raise ImportError(incompatibility_message(error)) from error
        return nodes


async def comfy_entrypoint() -> LoRA2Extension:
    """Called by ComfyUI when it loads the pack."""
    return LoRA2Extension()
