"""Kill a training process (SIGKILL) at random moments and resume its run: `python -m dev.kills`.

A run on a real model is killed and resumed from its newest training state until it is complete; then the next one starts. Every
third kill comes while a state is written, on a disk that is slowed down. After every kill, each listed state must load, and the
newest must be at most `state_every` steps behind the last reported step. The adapter of a run that was killed many times must
equal that of an uninterrupted run, bit for bit.

Most kills hit a process that is forked from this one with the model in memory, some a ComfyUI server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dev import assets, host
from dev.packs import pack
from dev.server import ComfyServer, PromptError

EVERY = 3
"""Steps between two states."""

WRITE_SECONDS = 0.4
"""Approximate time to write a state on the slowed-down disk."""

SETTINGS: dict[str, Any] = {
    "steps": 60, "learning_rate": 1e-2, "target_rank": 24, "initial_rank": 64, "save_dtype": "fp32", "state_every": EVERY,
    "caption_dropout": 0.3, "batch_size": 2, "layers": "all linear",
}  # fmt: skip
"""States that are large for the small model: writing them takes about a third of the time."""


@dataclass
class Figures:
    """Results. during_writes: kills that left an unfinished file. lost: after each kill, the steps between the newest state
    and the last step that was reported. unfinished: names of all unfinished files so far.
    """

    kills: int = 0
    server_kills: int = 0
    during_writes: int = 0
    runs_finished: int = 0
    finished_before_kill: int = 0
    states_loaded: int = 0
    lost: list[int] = field(default_factory=list)
    unfinished: set[str] = field(default_factory=set)

    def report(self) -> dict[str, Any]:
        """As plain values."""
        values = asdict(self)
        del values["unfinished"]
        return {**values, "worst": max(self.lost)}


class Failed(AssertionError):
    """Something that must hold did not."""


def require(condition: object, message: str) -> None:
    """Raise Failed unless the condition holds."""
    if not condition:
        raise Failed(message)


# -- checks after a kill --------------------------------------------------------------------------------------


def check_states(output: Path, name: str, reported: int, figures: Figures) -> int:
    """Check the files of a killed run; returns the step of its newest state, 0 without one."""
    directory, state = pack("lora2.checkpoints.directory"), pack("lora2.checkpoints.state")
    listed = directory.find_checkpoints(output / "lora2_states")
    for each in listed:
        found = state.read_state(each.path, 1 << 32)
        require(found.part("run").facts["step"] == each.step, f"{each.path.name} holds another step than its name says")
        figures.states_loaded += 1
    mine = directory.list_checkpoints(output / "lora2_states" / name)
    newest = mine[0].step if mine else 0
    figures.lost.append(max(0, reported - newest))
    require(reported - newest <= EVERY, f"{reported - newest} steps of {name} are lost after a kill at step {reported}")
    unfinished = {p.name for p in output.rglob("*.partial")}  # the run's next state removes them
    figures.during_writes += bool(unfinished - figures.unfinished)
    figures.unfinished |= unfinished
    return newest


def check_loras(folder: Path) -> None:
    """Every listed LoRA can be read."""
    for path in folder.rglob("*.safetensors"):
        pack("lora2.files.document").read(path)


# -- a process with the model in memory -------------------------------------------------------------------------------


class Direct:
    """Runs of the node in forked processes, on the small Flux."""

    def __init__(self, base: Path) -> None:
        import folder_paths

        self.base = base
        (base / "loras").mkdir(parents=True)
        folder_paths.folder_names_and_paths["loras"] = ([str(base / "loras")], {".safetensors"})
        folder_paths.output_directory = str(base / "output")
        folder_paths.temp_directory = str(base / "temp")
        import comfy.sd
        import torch

        torch.set_num_threads(1)
        with torch.inference_mode():
            self.model = comfy.sd.load_diffusion_model(str(assets.family("flux")))
        g = torch.Generator().manual_seed(1)
        shapes = ((8, 8), (8, 8), (8, 12))
        self.latents = [{"samples": torch.randn(1, 16, h, w, generator=g)} for h, w in shapes]
        self.captions = [
            [[torch.randn(1, 7, 4096, generator=g), {"pooled_output": torch.randn(1, 768, generator=g)}]]
            for _ in shapes
        ]

    def train(self, name: str, seed: int, continue_from: str, report: Callable[[int], None], **changes: Any) -> Path:
        """One run in this process. report: called after every step. changes: of SETTINGS."""
        import torch

        session, settings = pack("nodes.runs.run"), pack("lora2.config")
        values = {**SETTINGS, "seed": seed, **changes}
        request = session.RunRequest(
            save_name=name,
            layers=values.pop("layers"),
            save_dtype=values.pop("save_dtype"),
            state_every=values.pop("state_every"),
            precision=values.pop("precision", "auto"),
            continue_from=continue_from,
        )
        callback = pack("nodes.runs.step_callback").StepCallback
        real = callback.__call__

        def call(self: Any, progress: Any) -> None:
            real(self, progress)
            report(progress.step)

        callback.__call__ = call
        try:
            with torch.inference_mode():
                trained = session.train(
                    self.model, self.latents, self.captions, settings.TrainingConfig(**values), request
                )
        finally:
            callback.__call__ = real
        return Path(trained.path)

    def killed(self, name: str, seed: int, continue_from: str, after: float, write: int = 0) -> tuple[int, bool]:
        """A run in a forked process, killed `after` seconds after its first step: its last reported step, and whether it was complete.

        write: number of the state from whose writing on the seconds count; 0 = from the start.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            code = 1
            try:
                os.dup2(os.open(self.base / "child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                if write:
                    _slow_disk(writing)
                self.train(name, seed, continue_from, lambda step: _send(writing, str(step)))
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        try:
            return self._follow(child, reading, after, b"w" * write)
        finally:
            os.close(reading)

    def _follow(self, child: int, reading: int, after: float, writes: bytes) -> tuple[int, bool]:
        received, deadline, counting = b"", time.monotonic() + 120, False
        while time.monotonic() < deadline:
            ready, _, _ = select.select([reading], [], [], max(0.0, min(1.0, deadline - time.monotonic())))
            if ready:
                data = os.read(reading, 1 << 16)
                if not data:
                    break
                received += data
                if not counting and received.count(b"w") >= len(writes):  # from here the clock runs
                    deadline, counting = time.monotonic() + after, True
        os.kill(child, signal.SIGKILL)
        while data := os.read(reading, 1 << 16):
            received += data
        _, status = os.waitpid(child, 0)
        last = max((int(line) for line in received.split() if line != b"w"), default=0)
        done = os.WIFEXITED(status)
        require(
            not done or os.WEXITSTATUS(status) == 0, f"the run failed: {(self.base / 'child.log').read_text()[-2000:]}"
        )
        return last, done


def _send(pipe: int, line: str) -> None:
    os.write(pipe, f"{line}\n".encode())


def _slow_disk(pipe: int) -> None:
    """From now on every tensor takes a millisecond to write, and a "w" in the pipe marks the start of a file."""
    writer = pack("lora2.files.writer")
    real = writer.data

    def data(tensors: Any) -> Iterator[Any]:
        _send(pipe, "w")
        for piece in real(tensors):
            time.sleep(0.001)
            yield piece

    writer.data = data


def kill_direct(base: Path, kills: int, seed: int, figures: Figures) -> None:
    """Kill forked runs `kills` times, then let the last one complete."""
    import torch

    direct, chance = Direct(base), random.Random(seed)  # noqa: S311 (moments, not secrets)
    run_seed, limit = 0, figures.kills + kills
    began = time.monotonic()
    whole = tensors_of(direct.train("whole/x", run_seed, "nothing", lambda _: None))
    length = time.monotonic() - began
    name, kills_of_run = "killed/0", 0
    while True:
        folder = base / "output" / "lora2_states" / name
        source = "newest state" if pack("lora2.checkpoints.directory").list_checkpoints(folder) else "nothing"
        finishing = figures.kills >= limit
        write = chance.randrange(1, 4) if figures.kills % 3 == 2 and not finishing else 0
        moment = 1e9 if finishing else chance.uniform(0, WRITE_SECONDS if write else length / 4)
        step, done = direct.killed(name, run_seed, source, moment, write)
        check_loras(base / "loras")
        if not done:
            figures.kills += 1
            kills_of_run += 1
            newest = check_states(base / "output", name, step, figures)
            print(f"kill {figures.kills}: at step {step} after {moment:.2f} s, newest state {newest}", flush=True)
            continue
        figures.runs_finished += 1
        figures.finished_before_kill += not finishing
        found = tensors_of(max((base / "loras" / "killed").rglob(f"{name.split('/')[1]}_*.safetensors")))
        same = found.keys() == whole.keys() and all(torch.equal(found[k], whole[k]) for k in whole)
        require(same, f"{name}, killed {kills_of_run} times, is not the unbroken run")
        print(f"{name}: killed {kills_of_run} times, and the same adapter bit for bit", flush=True)
        if finishing:
            return
        name, kills_of_run = f"killed/{figures.runs_finished}", 0


def tensors_of(path: Path) -> dict[str, Any]:
    """A LoRA file's tensors."""
    return dict(pack("lora2.files.document").read(path).state_dict())


# -- whole servers ---------------------------------------------------------------------------------------------------


def kill_servers(base: Path, kills: int, seed: int, figures: Figures) -> None:
    """Train in a server that is killed `kills` times, resume, and compare with an uninterrupted run."""
    import torch

    chance, limit = random.Random(seed), figures.server_kills + kills  # noqa: S311
    output, step = base / "output", 0
    with ComfyServer(base) as server:
        assets.fill_base(base)
        server.run(_graph("whole/x", "nothing"))
    while True:
        with ComfyServer(base) as server:
            folder = output / "lora2_states" / "server" / "x"
            source = "newest state" if pack("lora2.checkpoints.directory").list_checkpoints(folder) else "nothing"
            if figures.server_kills >= limit:
                server.run(_graph("server/x", source))
                break
            step = _killed_server(server, source, chance.uniform(0, 4.0), figures)
        newest = check_states(output, "server/x", step, figures)
        check_loras(base / "models" / "loras")
        print(f"server kill {figures.server_kills}: at step {step}, newest state {newest}", flush=True)
    one, other = (tensors_of(base / "models" / "loras" / name / "x_00001.safetensors") for name in ("whole", "server"))
    require(all(torch.equal(one[k], other[k]) for k in one), "the run of the killed servers is not the unbroken one")
    figures.runs_finished += 1


def _killed_server(server: ComfyServer, source: str, after: float, figures: Figures) -> int:
    """The last step that a server reported before it was killed, `after` seconds after the first."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(server.run, _graph("server/x", source))
        deadline = time.monotonic() + 120
        while not _steps(server) and not run.done() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(after)
        server.kill()
        figures.server_kills += 1
        figures.kills += 1
        try:
            run.result(60)
        except (PromptError, OSError):
            pass
        else:
            raise Failed("the run had ended before the server was killed: give it more steps")
    return max(_steps(server), default=0)


def _steps(server: ComfyServer) -> list[int]:
    return [e["data"]["value"] for e in list(server.events) if e["type"] == "progress" and e["data"].get("node") == "4"]


def _graph(save_name: str, continue_from: str) -> dict[str, Any]:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    settings = {
        "steps": 60, "learning_rate": 1e-3, "batch_size": 1, "target_rank": 4, "budget_mb": 0.0, "layers": "attention", "seed": 1,
        "exclude": "*input_blocks* *output_blocks*", "save_dtype": "fp32", "state_every": EVERY,
    }  # fmt: skip
    data = {"model": ["1", 0], "latents": ["3", 0], "conditioning": ["3", 1]}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=assets.CHECKPOINT),
        "2": node("LoadImageTextDataSetFromFolder", folder="mug"),
        "3": node("MakeTrainingDataset", images=["2", 0], texts=["2", 1], vae=["1", 2], clip=["1", 1]),
        "4": node("LoRA2_TrainAdaptiveLora", **settings, **data, save_name=save_name, continue_from=continue_from),
        "5": node("LossGraphNode", loss=["4", 3], filename_prefix="loss"),
    }


def main() -> None:
    """Kill as often as options. Prints the figures as JSON at the end; raises Failed where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of forked processes")
    parser.add_argument("--server-kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    host.import_comfy()
    figures = Figures()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if options.server_kills:
            kill_servers(Path(folder) / "server", options.server_kills, options.seed, figures)
        if options.kills:
            kill_direct(Path(folder) / "direct", options.kills, options.seed, figures)
    print(json.dumps({**figures.report(), "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
