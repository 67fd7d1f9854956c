"""Models on disk and on the Hub: found, loaded, saved, told apart."""
