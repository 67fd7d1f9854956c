"""`python -m nope_gpt.cli`, which torchrun can start."""

from nope_gpt.cli import main

if __name__ == "__main__":
    main()
