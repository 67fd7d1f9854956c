"""From sources to documents to token shards to batches: the verb `prepare`, and how training reads."""
