"""What ComfyUI gives, and what is done to it."""
