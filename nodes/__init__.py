"""Thin ComfyUI nodes; `host` is the bridge behind them."""
