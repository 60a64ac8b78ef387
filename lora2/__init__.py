"""LoRA²: low-rank adapters whose every layer learns its own rank. Torch only; knows nothing of the host."""
