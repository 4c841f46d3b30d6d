"""Evaluation: perplexity, tasks by likelihood, and metrics."""
