"""`make ui`: the demo's server, left running for a person with a browser."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from pathlib import Path

from dev import assets, host
from dev.demo import TRAIN, WORKFLOWS, adapt, template
from dev.graphs import SAVED
from dev.server import PACK, ComfyServer

GUIDE = """
ComfyUI with LoRA² runs at {url} (Ctrl-C ends it). Open it in a browser, then

  Workflows (w), left > Browse    the three templates with the values of `make demo`: a small model and drawn
                                  pictures, about a minute on two cores. Double-click "{first}", then Run.
  Templates, left > {pack}  the same as they are shipped, for a real checkpoint and pictures of your own
                                  (models in {base}/models, pictures in {base}/input)
"""


def main() -> None:
    """Starts the server on the demo's base directory and waits for Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server is stopped too
    base = host.HOST / "demo"
    assets.fill_base(base)
    server = ComfyServer(base, port=8188 if _free(8188) else 0)
    with server, contextlib.suppress(KeyboardInterrupt):
        first = save_small_workflows(server)[0].stem
        print(GUIDE.format(url=server.url, first=first, pack=PACK, base=base), flush=True)
        server.wait()


def save_small_workflows(server: ComfyServer) -> list[Path]:
    """Writes the templates with the demo's values into the user's workflows; training comes first."""
    folder = server.base / "user" / "default" / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    loras, info, paths = server.base / "models" / "loras", server.object_info(), []
    trained = sorted(loras.glob("lora2/*.safetensors"), key=lambda path: path.stat().st_mtime)
    newest = trained[-1].relative_to(loras).as_posix() if trained else SAVED
    for shipped in sorted(WORKFLOWS.glob("*.json"), reverse=True):
        names = {} if shipped.stem == TRAIN else {"lora_name": newest}
        workflow, _ = adapt(template(shipped.stem), info, **names)
        path = folder / f"Small - {shipped.name}"
        path.write_text(json.dumps(workflow))
        paths.append(path)
    return paths


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


if __name__ == "__main__":
    main()
