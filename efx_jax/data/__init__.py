"""Data: rows, examples, tokens, batches and tasks."""
