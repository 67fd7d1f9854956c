"""The conversation in a terminal: keys, commands, and how answers are shown."""
