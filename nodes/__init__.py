"""Thin ComfyUI nodes; `comfy` and `runs` is the bridge behind them."""
