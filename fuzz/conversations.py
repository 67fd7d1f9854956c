"""Conversations and settings: transcripts, the template, calls of tools, TOML."""

from fuzzing import fuzz

if __name__ == "__main__":
    fuzz("a transcript", "settings")
