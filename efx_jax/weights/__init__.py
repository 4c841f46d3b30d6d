"""Checkpoints: Hugging Face folders, GGUF files and Orbax folders, read into the parameter tree and written from it."""
