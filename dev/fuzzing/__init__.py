"""Fuzzing of everything that reads a LoRA file: handmade hostile files, mutations of files, and what must always hold."""
