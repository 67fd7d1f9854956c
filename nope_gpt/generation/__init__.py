"""A prompt to its continuation: logits to tokens to text, one prompt or many."""
