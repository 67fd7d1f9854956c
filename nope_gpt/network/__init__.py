"""What the network is made of: its parts, its loss, its cache, and how few tokens are read fast."""
