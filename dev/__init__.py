"""Tools of the developers, never shipped: a real ComfyUI, small models, pictures, the demo."""
