"""Changing a model that was trained: low-rank adapters, longer contexts."""
