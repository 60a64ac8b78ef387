"""A node pack for test servers only: figures of the process, a model's fingerprint, and points at which training waits.

Linked into a test server's custom_nodes; no part of what is published.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from aiohttp import web
from comfy.cli_args import args
from server import PromptServer

PATIENCE = 20.0
"""Seconds that a point waits for a cancel before it goes on."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def pack(module: str) -> Any:
    """A module of the pack as ComfyUI has imported it."""
    return next(m for name, m in list(sys.modules.items()) if name.endswith("." + module) and "lora2-adaptive" in name)


# --- figures


def figures() -> dict[str, Any]:
    """What must not grow, after a full collection: memory, threads, files, hooks, tensors."""
    gc.collect()
    objects = gc.get_objects()
    modules = [o for o in objects if isinstance(o, torch.nn.Module)]
    tensors = [o for o in objects if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_nested]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "hooks": sum(len(getattr(m, kind)) for m in modules for kind in HOOKS),
        "forwards": sum("forward" in vars(m) for m in modules),
        "adapters": sum(type(o).__name__ == "Adapter" for o in objects),
        "tensors": sum(storages.values()),
        "training": bool(management.in_training),
    }


class Fingerprint:
    """A model's weights and what hangs on them, as text: sha256 over every name and tensor."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "number": ("INT", {"default": 0})}}

    def run(self, model: Any, number: int) -> dict[str, Any]:
        management.load_models_gpu([model], force_full_load=True)
        digest = hashlib.sha256()
        state = model.model.state_dict()
        for name in sorted(state):
            digest.update(
                f"{name} {state[name].dtype} {tuple(state[name].shape)} {state[name].is_inference()}".encode()
            )
            digest.update(state[name].contiguous().view(torch.uint8).cpu().numpy().tobytes())
        hooks = sum(len(getattr(m, kind)) for m in model.model.modules() for kind in HOOKS)
        return {"ui": {"text": [json.dumps({"weights": digest.hexdigest(), "hooks": hooks})]}}


# --- points


class Points:
    """Where training is to wait for a cancel: armed over the API, reached in the node."""

    def __init__(self) -> None:
        self.armed = ""
        self.skip = 0
        self.reached = threading.Event()
        self.placed = False
        self.go = threading.Event()

    def arm(self, point: str, skip: int) -> None:
        """The next time but `skip` that this point is reached, wait there until a cancel or a word to go on arrives."""
        if not self.placed:
            self.place()
        self.reached.clear()
        self.go.clear()
        self.armed, self.skip = point, skip

    def here(self, point: str) -> None:
        if self.armed != point:
            return
        if self.skip:
            self.skip -= 1
            return
        self.armed = ""
        self.reached.set()
        deadline = time.monotonic() + PATIENCE
        while not (management.processing_interrupted() or self.go.is_set()) and time.monotonic() < deadline:
            time.sleep(0.005)
        self.go.clear()

    def place(self) -> None:
        """Wrap the functions that are these points."""
        self.placed = True
        for point, (module, owner, name) in {
            "start": ("lora2.training.trainer", "Trainer", "run"),
            "step": ("nodes.comfy.model", "HostModel", "denoise"),
            "sync": ("lora2.adapters.network", "AdaptiveNetwork", "sync_capacities"),
            "settling": ("lora2.training.trainer", "", "prune"),
            "preview": ("nodes.runs.step_callback", "", "preview_picture"),
            "factors": ("nodes.runs.finish", "", "final_factors"),
            "saving": ("nodes.runs.save", "", "write_new"),
            "after": ("nodes.train", "", "rank_picture"),
        }.items():
            found = pack(module)
            holder = getattr(found, owner) if owner else found
            setattr(holder, name, self.wrapped(getattr(holder, name), point))

    def wrapped(self, function: Callable[..., Any], point: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.here(point)
            return function(*args, **kwargs)

        return run


POINTS = Points()
routes = PromptServer.instance.routes


@routes.get("/probe/figures")
async def _figures(_request: web.Request) -> web.Response:
    return web.json_response(figures())


@routes.post("/probe/arm")
async def _arm(request: web.Request) -> web.Response:
    wanted = await request.json()
    POINTS.arm(wanted["point"], wanted.get("skip", 0))
    return web.json_response({})


@routes.post("/probe/go")
async def _go(_request: web.Request) -> web.Response:
    POINTS.go.set()
    return web.json_response({})


@routes.get("/probe/reached")
async def _reached(_request: web.Request) -> web.Response:
    return web.json_response({"reached": POINTS.reached.is_set()})


@routes.post("/probe/disable_metadata")
async def _disable_metadata(request: web.Request) -> web.Response:
    """What --disable-metadata sets, while the server runs."""
    args.disable_metadata = (await request.json())["value"]
    return web.json_response({})


NODE_CLASS_MAPPINGS = {"LoRA2Test_Fingerprint": Fingerprint}
