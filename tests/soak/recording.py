"""What a soak run found, for docs/reliability.md: printed, and kept in .host/soak.json."""

from __future__ import annotations

import json
from typing import Any

from dev.host import HOST


def record(name: str, found: dict[str, Any]) -> None:
    """Add one test's figures."""
    path = HOST / "soak.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: found}, indent=2) + "\n")
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
