"""Generated pages against the nodes, and help where ComfyUI's frontend asks for it."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dev import docs
from dev.host import ROOT
from dev.server import ComfyServer


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [docs.REFERENCE, *docs.HELP.iterdir()], ids=lambda path: path.name)
def test_generated_pages_are_up_to_date(page: Path) -> None:
    assert text(page) == docs.pages()[page], "Run python -m dev.docs."


def test_every_input_and_output_is_in_the_tables() -> None:
    for node, info in docs.schemas().items():
        names = [*(name for name, *_ in docs.inputs(info)), *info["output_name"]]
        for page in (docs.help_page(node), docs.tables(info, "##")):
            assert all(f"\n| `{name}` | " in page for name in names)


def test_the_server_describes_the_nodes_as_the_pages_do(server: ComfyServer) -> None:
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


def test_links_of_help_pages_exist() -> None:
    """They are absolute, since the pages are read inside ComfyUI."""
    base = "https://github.com/lora2-adaptive/lora2/blob/main/"
    links = [link for page in docs.HELP.iterdir() for link in re.findall(r"\]\(([^)]+)\)", text(page))]
    assert links
    assert all(link.startswith(base) and (ROOT / link.removeprefix(base)).exists() for link in links)


def test_every_node_has_a_help_page() -> None:
    for folder in (docs.HELP, docs.HELP_TEXTS):
        assert {path.stem for path in folder.iterdir()} == set(docs.NODES)
