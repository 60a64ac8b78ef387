"""What only a GPU can show; left out, and said so, where there is none (conftest.py)."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import out_of_memory

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("choices", [{}, {"checkpointing": "off"}], ids=["default", "no checkpointing"])
def test_real_out_of_memory(choices: dict[str, Any], comfy: Any) -> None:
    """In less and less memory: the same losses as long as there is a way, and then our message; nothing broken after."""
    rows = out_of_memory.measure(**choices)
    assert not rows[0]["message"]
    changed = [row for row in rows if row["losses"] and "Memory ran out on the way" in row["said"][-1]]
    assert changed, "no run had to save memory: the limits are too wide"
    assert rows[-1]["message"].startswith("Memory ran out")
