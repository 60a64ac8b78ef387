"""These tests need torch, not ComfyUI: `pytest tests/unit` runs on any machine that has dev-requirements.txt and torch."""
