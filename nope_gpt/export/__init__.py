"""Trained models to directories that other programs read: the verb `export`."""
