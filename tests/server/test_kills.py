"""A few of the kills of `make soak`: SIGKILL at random moments, and the run goes on to the same adapter."""

from __future__ import annotations

import json
import subprocess

from dev import host


def test_a_killed_run_goes_on_to_the_same_adapter() -> None:
    """In a process of its own, which forks: this one has threads by now."""
    command = [str(host.python()), "-m", "dev.kills", "--kills", "3", "--server-kills", "0", "--seed", "7"]
    done = subprocess.run(command, cwd=host.ROOT, env=host.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] == 3
    assert figures["runs_finished"] >= 1
    assert figures["worst"] <= 3
    assert figures["states_loaded"] > 0
