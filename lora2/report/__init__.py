"""What a LoRA's ranks look like: tables, pictures, text."""
