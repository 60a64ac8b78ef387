"""Prompts that no web page would send: whatever an input holds, the run succeeds or one clear error names the input.

The widgets are passed by over the API, and links from nodes that give anything pass the types by. All inputs come from the
server's own list (/object_info), so that a new one is tried without being named here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from probed_server import SUPPORT

from dev import assets
from dev.fuzzing.corpus import WORDS
from dev.server import ComfyServer, PromptError

TRAIN, LOAD, INSPECT = "LoRA2_TrainAdaptiveLora", "LoRA2_LoadAdaptiveLora", "LoRA2_InspectRanks"
SOCKETS = {"MODEL": ["1", 0], "CLIP": ["1", 1], "LATENT": ["3", 0], "CONDITIONING": ["2", 0]}
SMALL = {
    "steps": 1,
    "target_rank": 1,
    "initial_rank": 1,
    "settle_at": 1.0,
    "save_name": "t/x",
    "exclude": "*input_blocks*\n*output_blocks*",
}
EXAMPLES = int(os.environ.get("EXAMPLES", "3"))
"""Values tried in each input of each node."""

QUICK = settings(
    derandomize=True, database=None, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)  # fmt: skip

SPOKEN = {
    "latents": "Latents entry", "conditioning": "Caption|conditioning", "empty_caption": "empty caption",
    "include": "pattern", "exclude": "pattern", "lora_name": "LoRA folders|safetensors", "lora": "LoRA",
}  # fmt: skip
"""How messages speak of some inputs, beside their names."""


@pytest.fixture(scope="module")
def any_server(server: ComfyServer) -> Iterator[ComfyServer]:
    """The server with one good LoRA, and a folder outside with a link to it from the LoRA folder, which is not there afterwards."""
    base, loras = server.base, server.base / "models" / "loras"
    (base / "outside").mkdir()
    (loras / "link").symlink_to(base / "outside", target_is_directory=True)
    server.run(graph(server, TRAIN, {"save_name": "first"}))
    (loras / "first_00001.safetensors").rename(loras / "good.safetensors")
    shutil.copyfile(loras / "good.safetensors", base / "secret.safetensors")
    yield server
    (loras / "link").unlink()
    assert outcome(server, graph(server, TRAIN, {"seed": 99}))[0] == "done", "the server is broken afterwards"


def known_inputs(server: ComfyServer, node: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every input of a node: its type and its options."""
    if node not in _KNOWN:
        groups = server.object_info(node)["input"]
        every = {name: spec for group in ("required", "optional") for name, spec in groups.get(group, {}).items()}
        _KNOWN[node] = {
            name: ("COMBO" if isinstance(spec[0], list) else spec[0], dict(spec[1]) if len(spec) > 1 else {})
            for name, spec in every.items()
        }
    return _KNOWN[node]


_KNOWN: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {}


def graph(server: ComfyServer, node: str, change: dict[str, Any]) -> dict[str, Any]:
    """A small run of one node, with some of its inputs changed; a string that begins with "←" is linked from TestAnything."""
    inputs: dict[str, Any] = {}
    for name, (kind, options) in known_inputs(server, node).items():
        if name == "lora_name" and "lora" not in change:
            inputs[name] = "good.safetensors"
        elif kind in SOCKETS:
            inputs[name] = SOCKETS[kind]
        elif "default" in options:
            inputs[name] = options["default"]
    inputs |= {name: value for name, value in SMALL.items() if name in inputs and name != "lora_name"}
    prompt: dict[str, Any] = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": assets.CHECKPOINT}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a mug"}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": node, "inputs": inputs},
        "5": {"class_type": "TestTake", "inputs": {"value": ["4", 0]}},
    }
    for name, value in change.items():
        if isinstance(value, Linked):
            prompt["9"] = {"class_type": value.node, "inputs": {"json": json.dumps(value.value), "name": value.name}}
            value = ["9", 0]
        inputs[name] = value
    return prompt


class Linked:
    """A value that arrives through a link of the type that fits every input."""

    def __init__(self, value: Any = 0, name: str = "", many: bool = False) -> None:
        self.value, self.name = value, name
        self.node = "TestAnyList" if many else "TestAnything"

    def __repr__(self) -> str:
        return f"Linked({self.value!r}, {self.name!r}, {self.node})"


def outcome(server: ComfyServer, prompt: dict[str, Any]) -> tuple[str, str]:
    """What came of a prompt: "done"; "refused" by the host before it ran, and why; "failed" at a node, and its message."""
    try:
        server.run(prompt, timeout=60)
        return "done", ""
    except PromptError as error:
        why = str(error)
    failed = [e["data"] for e in server.events if e["type"] == "execution_error"]
    if not failed:
        return "refused", why
    assert failed[0]["exception_type"] == "lora2.LoraError", why
    return "failed", failed[0]["exception_message"].strip()


def outside(server: ComfyServer) -> set[str]:
    """Every file that is neither in ComfyUI's folders for LoRAs, results and temporary files, nor its own."""
    allowed = ("models/loras/", "output/", "temp/", "custom_nodes/", "server.log", "user/")
    files = (p.relative_to(server.base).as_posix() for p in server.base.rglob("*") if p.is_file())
    return {name for name in files if not name.startswith(allowed)}


def check(server: ComfyServer, node: str, name: str, value: Any) -> str:
    """Run a node with one input changed; returns what came of it."""
    before = outside(server)
    what, words = outcome(server, graph(server, node, {name: value}))
    assert outside(server) == before
    assert list((server.base / "outside").iterdir()) == []
    if what == "done":
        return what
    spoken = [name, *SPOKEN.get(name, name).split("|")]
    if what == "refused":
        # A list of two is a link to ComfyUI; one that leads nowhere it answers itself, naming the node alone.
        spoken += (
            ["Exception when validating", "Dependency cycle"] if isinstance(value, list) and len(value) == 2 else []
        )
        assert "node 4" in words, words
    else:
        assert words.isprintable(), words
        assert words.endswith((".", ")")), words
        assert len(words) < 1000, words
        assert not any(
            kind in words for kind in ("Traceback", "AttributeError", "TypeError", "KeyError", "NoneType")
        ), words
    assert any(word in words for word in spoken), words
    return what


def numbers(options: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Numbers at the edges of an input and beyond; nothing that would train for long."""
    low, high = options.get("min", 0), options.get("max", 1 << 64)
    return st.sampled_from(
        (low, low - 1, low - 1e-9, high + 1, high * 2, -high - 1, 10**400, -(10**30), 0, -1, 0.5, 1e308)
    )


def plain() -> st.SearchStrategy[Any]:
    """Any JSON that is no link."""
    leaves = (
        st.none() | st.booleans() | st.sampled_from(WORDS) | st.sampled_from((0, -1, 1e308, float("nan"), float("inf")))
    )
    words = st.sampled_from(WORDS)
    nested = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=2))
    return nested.filter(lambda value: not (isinstance(value, dict) and "__value__" in value))


def values(kind: str, options: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What may be sent for an input: as it is, wrapped as the host allows, as a link that leads nowhere, or through a link."""
    own = numbers(options) if kind in ("INT", "FLOAT") else st.sampled_from(WORDS)
    wrapped = st.builds(lambda value: {"__value__": value}, plain().filter(lambda value: not isinstance(value, list)))
    nowhere = st.sampled_from(
        (["77", 0], [5, 6], ["1", 9], ["1", -9], [None, None], [["1"], 0], ["4", 0], ["2", 0], ["1", 0.5])
    )
    linked = st.builds(Linked, own | plain()) | st.builds(Linked, name=st.sampled_from(objects()))
    return st.one_of(own, plain(), wrapped, nowhere, linked, linked)


def objects() -> list[str]:
    """The names of what packs/anything.py can give."""
    text = (SUPPORT / "packs" / "anything.py").read_text()
    table = text[text.index("OBJECTS = {") : text.index("\n}\n", text.index("OBJECTS = {"))]
    return [line.split('"')[1] for line in table.splitlines()[1:]]


@pytest.mark.parametrize("node", [TRAIN, LOAD, INSPECT])
def test_any_value_in_any_input_is_taken_or_refused_by_name(node: str, any_server: ComfyServer) -> None:
    known = known_inputs(any_server, node)
    seen: dict[str, set[str]] = {name: set() for name in known}

    for name, (kind, options) in known.items():

        @settings(QUICK, max_examples=EXAMPLES)
        @given(st.just(name), values(kind, options))
        def one(name: str, value: Any) -> None:
            seen[name].add(check(any_server, node, name, value))

        one()
    assert all(seen[name] - {"done"} for name in known), f"nothing was refused: {seen}"


@pytest.mark.parametrize("name", objects())
def test_objects_of_other_kinds_are_refused_wherever_they_are_connected(name: str, any_server: ComfyServer) -> None:
    """Each object into each socket, which no property leaves to chance."""
    captions = {"conditioning", "empty_caption"}
    fits = {("latents", "whole numbers as latent")} | {(socket, "whole numbers as text") for socket in captions}
    for node, sockets in ((TRAIN, {"model", "latents"} | captions), (LOAD, {"model", "clip"}), (INSPECT, {"lora"})):
        for socket in sorted(sockets):
            what = check(any_server, node, socket, Linked(name=name))
            assert what == ("done" if (socket, name) in fits else "failed"), f"{socket} ← {name}"


def test_empty_lists_are_refused_by_name(any_server: ComfyServer) -> None:
    """Of a node that takes lists; for the others ComfyUI itself fails before it calls them."""
    for name in known_inputs(any_server, TRAIN):
        what, words = outcome(any_server, graph(any_server, TRAIN, {name: Linked([], many=True)}))
        if name == "empty_caption":  # may be left open
            assert what == "done"
        else:
            assert what in ("failed", "refused"), name  # continue_from is looked at before the run
            assert any(word in words for word in (name, "no latents", "no conditioning")), words


NAMES = (
    "../x", "a/../../x", "..", "{base}/outside/x", "C:\\x", "c:x", "\\\\host\\share\\x", "link/x", "link/../x", "link/new/x",
    "con", "a/NUL.txt/x",
    "lpt1", "x:stream", ".hidden", "", " ", "\0", "x\0y", "x\n", "x\u202e", "\ud800", "x" * 300, "y/" * 600 + "x",
    "~/x", "$HOME/x",
)  # fmt: skip


@pytest.mark.parametrize("linked", [False, True], ids=["widget", "link"])
def test_names_that_lead_elsewhere_are_refused(linked: bool, any_server: ComfyServer) -> None:
    """save_name and the file choosers: absolute, upwards, through links, devices, streams, hidden, too long."""
    taken = {"~/x", "$HOME/x"}  # folders of these names inside the LoRA folder: nothing is expanded
    for name in (name.replace("{base}", str(any_server.base)) for name in NAMES):
        value = Linked(name) if linked else name
        assert check(any_server, TRAIN, "save_name", value) == ("done" if name in taken else "failed"), name
        for node in (LOAD, INSPECT):
            assert check(any_server, node, "lora_name", value) in ("failed", "refused"), name
    assert not (Path.home() / "x_00001.safetensors").exists()


@pytest.mark.parametrize("node", [LOAD, INSPECT])
def test_files_elsewhere_are_not_read(node: str, any_server: ComfyServer) -> None:
    """A LoRA that could be read, if a name were allowed to lead to it."""
    base = any_server.base
    assert (base / "models/loras/../../secret.safetensors").is_file()
    upwards = ("../../secret.safetensors", "x/../../../secret.safetensors", "..\\..\\secret.safetensors")
    for name in (*upwards, f"{base}/secret.safetensors"):
        for value in (name, Linked(name)):
            assert check(any_server, node, "lora_name", value) in ("failed", "refused"), name


def test_texts_of_enormous_length_are_refused(any_server: ComfyServer) -> None:
    for name, (kind, _) in known_inputs(any_server, TRAIN).items():
        if kind == "STRING":
            assert check(any_server, TRAIN, name, "a " * 2_000_000) == "failed"
            assert check(any_server, TRAIN, name, "*a" * 4_000) == "failed", "a pattern that takes for ever"
