"""Sources to documents to token shards to batches: the verb `prepare`, and what training reads."""
