"""The bridge to ComfyUI: the only place that knows its internals. Plain values in, plain values out."""
