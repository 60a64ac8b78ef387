"""The tests bite: faults put back into a copy of the pack, one at a time, each caught by the test that is there for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recording import record

from dev.host import HOST, ROOT, VENV

FAULTS = {
    "a hook left behind": (
        "lora2/adapters/attach.py",
        "stack.callback(adapter.module.register_forward_hook(_hook(adapter)).remove)",
        "adapter.module.register_forward_hook(_hook(adapter))",
        "tests/comfy/test_training.py tests/comfy/test_failures.py tests/server/test_cancel_anywhere.py",
    ),
    "an inference tensor kept": (
        "nodes/comfy/weights.py",
        "                alias = ordinary(original)",
        "                alias = original if original.ndim == 1 else ordinary(original)",
        "tests/comfy/test_training.py tests/comfy/test_base_models.py",
    ),
    "a missing moment in the state": (
        "lora2/training/optimizer.py",
        "            if isinstance(value, Tensor)\n",
        "            if isinstance(value, Tensor) and name != 'exp_avg_sq'\n",
        "tests/unit/checkpoints/test_state.py",
    ),
    "a non-atomic write": (
        "lora2/files/writer.py",
        "                for piece in data(tensors):\n                    file.write(piece)\n                file.flush()\n"
        "                os.fsync(file.fileno())\n            path = publish(temporary)",
        "                path = publish(temporary)\n                for piece in data(tensors):\n"
        "                    file.write(piece)",
        "tests/unit/checkpoints/test_directory.py tests/unit/files/test_writer.py",
    ),
    "an unchecked path": (
        "nodes/runs/target.py",
        "    if not inside(folder, root):\n        _refuse(",
        "    if not root:\n        _refuse(",
        "tests/comfy/test_bad_input.py tests/server/test_requests.py",
    ),
    "weights not given back after training": (
        "nodes/comfy/weights.py",
        "            if slots.get(name) is alias:\n                slots[name] = original",
        "            pass",
        "tests/comfy/test_training.py tests/comfy/test_failures.py",
    ),
    "gradients of a failed attempt kept": (
        "lora2/training/out_of_memory.py",
        "        self.network.drop_gradients()\n        free_cached_memory()",
        "        free_cached_memory()",
        "tests/unit/training/test_out_of_memory.py",
    ),
    "a second draw for the second attempt": (
        "lora2/training/trainer.py",
        "self.batches.micro_batches(batches)",
        "self.batches.micro_batches(self._sample_batches())",
        "tests/unit/training/test_out_of_memory.py",
    ),
    "what a failed attempt held is kept": (
        "lora2/util/memory.py",
        "        if not out_of_memory(error):\n            raise\n        return []",
        "        if not out_of_memory(error):\n            raise\n        attempt.kept = error\n        return []",
        "tests/unit/training/test_out_of_memory.py",
    ),
    "memory that ran out taken for a step that cannot be recorded": (
        "lora2/training/cuda_graph.py",
        "            if is_out_of_memory(error):\n                raise\n",
        "",
        "tests/unit/training/test_out_of_memory.py",
    ),
    "a bad step counted as taken": (
        "lora2/training/monitor.py",
        "        if applied:\n            self._consecutive_skips = 0",
        "        if applied or self.config.on_bad_step == 'skip':\n            self._consecutive_skips = 0",
        "tests/unit/training/test_monitor.py",
    ),
    "a cancel that loses what was learned": (
        "nodes/runs/run.py",
        "        except BaseException as reason:",
        "        except Exception as reason:",
        "tests/comfy/test_failures.py tests/server/test_cancel_anywhere.py",
    ),
}
"""What is wrong: the file, what stands there, what would stand there, and the tests of which one must fail at least."""


def copied(folder: Path) -> Path:
    """The repository without what is built; the set-up is shared."""
    away = shutil.ignore_patterns(".git", ".host", ".venv", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=away, symlinks=True)
    (folder / ".host").symlink_to(HOST.resolve(), target_is_directory=True)
    (folder / ".venv").symlink_to(VENV.resolve(), target_is_directory=True)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    file, old, new, tests = FAULTS[fault]
    folder = copied(tmp_path / "pack")
    text = (folder / file).read_text()
    assert text.count(old) == 1, "the code has changed: describe the fault anew"
    (folder / file).write_text(text.replace(old, new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests.split()]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert done.returncode == 1, done.stdout[-3000:]
    assert failed, done.stdout[-3000:]
    record(f"fault: {fault}", {"caught by": failed[0]})
