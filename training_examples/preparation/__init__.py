"""From any dataset to training examples: sources, records, examples, shards, mixtures."""
