"""What is written whole or not at all, and what anybody may have written."""
