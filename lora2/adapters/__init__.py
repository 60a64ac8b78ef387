"""Adapters on a frozen model's layers: forward, backward, resizing, pruning."""
