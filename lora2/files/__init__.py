"""LoRA files: keys, metadata, reading, writing, resizing."""
