"""Models, adapters and runs: config.json, tensors, tokenizers, histories, states."""

from fuzzing import fuzz

if __name__ == "__main__":
    fuzz(
        "a published model", "a model in parts", "an Arcee", "a Llama", "a run", "an old checkpoint"
    )
