"""Data sets: manifests, shards, tokenizers."""

from fuzzing import fuzz

if __name__ == "__main__":
    fuzz("texts", "chats", "pairs")
