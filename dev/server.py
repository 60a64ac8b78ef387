"""A running ComfyUI server with the pack installed, driven through its own API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dev import host

PACK = "lora2-adaptive"
FOLDERS = (
    "custom_nodes",
    "input",
    "output",
    "temp",
    "user",
    "models/checkpoints",
    "models/diffusion_models",
    "models/loras",
    "models/vae",
    "models/text_encoders",
)


class PromptError(RuntimeError):
    """A prompt was refused or failed; the message says at which node and why."""


def make_base(folder: Path) -> Path:
    """ComfyUI's base directory: its folders, and the repository linked as a custom node."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    link = folder / "custom_nodes" / PACK
    if not link.is_symlink():
        link.symlink_to(host.ROOT, target_is_directory=True)
    return folder


class ComfyServer:
    """`with ComfyServer(folder) as server: server.run(prompt)`; on the CPU unless torch has CUDA.

    base_dir: filled by make_base; port: 0 picks a free one; extra_args: more of main.py's own options.
    """

    def __init__(self, base_dir: Path | str, port: int = 0, extra_args: tuple[str, ...] = ()) -> None:
        self.base = make_base(Path(base_dir).resolve())
        self.extra_args = extra_args
        self.port = port or _free_port()
        self.client = uuid.uuid4().hex
        self.events: list[dict[str, Any]] = []
        self.previews: list[bytes] = []
        self.texts: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self.base / "server.log"

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address a browser opens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, timeout: float = 120) -> None:
        """Starts main.py and waits until it answers."""
        command = [host.python(), host.comfy_path() / "main.py", "--listen", "127.0.0.1", "--port", self.port]
        command += ["--base-directory", self.base, "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", *([] if _has_cuda() else ["--cpu"]), *self.extra_args]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                cwd=host.comfy_path(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=host.environment(),
            )
        try:
            self._wait_until_ready(self._process, timeout)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {process.returncode}:\n{self.logs()[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.1)
        raise RuntimeError(f"ComfyUI did not answer within {timeout:.0f} s:\n{self.logs()[-4000:]}")

    def stop(self) -> None:
        """Ends the server; safe to call twice."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """Ends the server at once, as a crash or a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self) -> None:
        """Blocks until the server ends by itself."""
        if self._process is not None:
            self._process.wait()

    def logs(self) -> str:
        """Everything the server printed since it started."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def get(self, path: str) -> Any:
        """The JSON answer to a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return json.load(reply)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to a POST, None when empty."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            text = reply.read()
            return json.loads(text) if text else None

    def object_info(self, node: str = "") -> dict[str, Any]:
        """ComfyUI's description of one node, or of all."""
        info = self.get(f"/object_info/{urllib.parse.quote(node)}" if node else "/object_info")
        return info.get(node, {}) if node else info

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Cancels what runs now."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queues an API-form prompt and returns its id; a refused one raises PromptError."""
        try:
            return str(self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"])
        except urllib.error.HTTPError as error:
            raise PromptError(_refusal(error.read().decode())) from None

    def run(self, prompt: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Runs an API-form prompt to its end; returns its history entry, leaves .events, .previews and .texts.

        Raises PromptError when it is refused, fails or is cancelled; TimeoutError (and a cancel) when slow.
        """
        self.events, self.previews, self.texts = [], [], []
        # A thread of its own: the caller may be inside another event loop (Playwright).
        with ThreadPoolExecutor(1) as thread:
            prompt_id = thread.submit(asyncio.run, self._follow(prompt, timeout)).result()
        return self.get(f"/history/{prompt_id}")[prompt_id]

    async def _follow(self, prompt: dict[str, Any], timeout: float) -> str:
        import aiohttp  # ComfyUI's own requirement

        address = f"{self.url}/ws?clientId={self.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket_:
            prompt_id = await asyncio.to_thread(self.submit, prompt)
            try:
                async with asyncio.timeout(timeout):
                    async for message in socket_:
                        if message.type == aiohttp.WSMsgType.BINARY:
                            self._note_binary(message.data)
                        elif message.type != aiohttp.WSMsgType.TEXT:
                            break
                        elif self._ended(message.json(), prompt_id):
                            return prompt_id
            except TimeoutError:
                await asyncio.to_thread(self.interrupt, prompt_id)
                raise
        raise PromptError(f"the server went away:\n{self.logs()[-4000:]}")

    def _note_binary(self, data: bytes) -> None:
        """Notes a picture in the making, or words that a node says of its work (protocol.py of ComfyUI)."""
        kind, number = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
        if kind == 1:
            self.previews.append(data[8:])  # the number is its format
        elif kind == 3:
            self.texts.append(data[8 + number :].decode())  # the number is the length of the node's id

    def _ended(self, event: dict[str, Any], prompt_id: str) -> bool:
        """Notes one event; True when the prompt is done."""
        data = event.get("data", {})
        if data.get("prompt_id", prompt_id) != prompt_id:
            return False
        self.events.append(event)
        if event["type"] == "execution_error":
            error = f"{data['exception_type']}: {data['exception_message']}"
            raise PromptError(f"node {data['node_id']} ({data['node_type']}): {error}")
        if event["type"] == "execution_interrupted":
            raise PromptError(f"interrupted at node {data['node_id']} ({data['node_type']})")
        # Sent once the history holds the outputs, after `execution_success`.
        return event["type"] == "executing" and data["node"] is None


def _refusal(body: str) -> str:
    """What /prompt says of a bad prompt, one line a node."""
    try:
        answer = json.loads(body)
        lines = [str(answer["error"]["message"])]
        for node, found in (answer.get("node_errors") or {}).items():
            where = f"node {node} ({found['class_type']})"
            lines += [f"{where}: {error['message']}: {error['details']}" for error in found["errors"]]
    except (ValueError, KeyError, TypeError):
        return body
    return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _has_cuda() -> bool:
    if not shutil.which("nvidia-smi"):
        return False  # asking torch takes seconds
    command = [str(host.python()), "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
