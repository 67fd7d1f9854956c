"""One training loop, and what pretraining and tuning hand to it: `pretrain` and `tune`."""
