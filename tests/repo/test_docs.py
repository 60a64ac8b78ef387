"""What README, method page and help pages say, against the code; and the help pages where ComfyUI's frontend asks for them."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dev import docs
from dev.server import ComfyServer

WORDS = "See python -m dev.docs."


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", docs.documents(), ids=lambda path: path.name)
def test_tables_say_what_the_nodes_say(page: Path) -> None:
    assert docs.render(text(page), docs.schemas()) == text(page), WORDS


@pytest.mark.parametrize("page", docs.documents(), ids=lambda path: path.name)
def test_every_input_and_output_is_in_a_table(page: Path) -> None:
    nodes = [page.stem] if page.stem in docs.NODES else list(docs.NODES)
    tables = [(m[2], m[3]) for m in docs.BLOCK.finditer(text(page))]
    for node in nodes:
        kinds = {"inputs", "outputs"}
        kinds |= {"advanced"} if any(o.get("advanced") for _, _, o, _ in docs.inputs(docs.schemas()[node])) else set()
        assert sorted(kind for kind, name in tables if name == node) == sorted(kinds)


def test_the_tables_come_from_what_the_server_says(server: ComfyServer) -> None:
    for node, info in docs.schemas().items():
        assert docs.texts(server.object_info(node)) == docs.texts(info)


def help_address(server: ComfyServer, node: str) -> str:
    """Where the frontend (1.47) looks for help: the pack's folder is the second part of the node's python module."""
    module = server.object_info(node)["python_module"]
    assert module.startswith("custom_nodes.")
    return f"{server.url}/extensions/{module.split('.')[1].split('@')[0]}/docs/{node}"


@pytest.mark.parametrize("node", docs.NODES)
def test_the_frontend_finds_the_help_page(server: ComfyServer, node: str) -> None:
    """It asks for a page in its language first, then for the one without; HTML in the place of either counts as none."""
    address = help_address(server, node)
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(f"{address}/en.md", timeout=30)  # noqa: S310 (our own server)
    assert missing.value.code == 404
    with urllib.request.urlopen(f"{address}.md", timeout=30) as reply:  # noqa: S310
        assert reply.status == 200
        assert "text/html" not in reply.headers["Content-Type"]
        page = reply.read().decode()
    assert page == text(docs.HELP / f"{node}.md")
    assert page.startswith(f"# {docs.schemas()[node]['display_name']}\n")


def test_help_pages_are_those_of_the_nodes() -> None:
    assert {path.stem for path in docs.HELP.iterdir()} == set(docs.NODES)
