"""`make ui`: the demo's server, left running for a person with a browser."""

from __future__ import annotations

import contextlib
import signal

from dev import assets, host
from dev.server import ComfyServer


def main() -> None:
    """Starts the server on the demo's base directory and waits for Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server is stopped too
    base = host.HOST / "demo"
    server = ComfyServer(base, port=8188 if _free(8188) else 0)
    assets.fill_base(base)
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"ComfyUI with LoRA² runs at {server.url} (Ctrl-C ends it).", flush=True)
        print("Templates: Workflow > Browse Templates > lora2-adaptive. Pictures: input/mug.", flush=True)
        server.wait()


def _free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


if __name__ == "__main__":
    main()
