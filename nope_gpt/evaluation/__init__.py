"""What a model knows, and how far it reaches."""
