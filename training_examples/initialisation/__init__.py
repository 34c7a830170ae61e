"""From a text language model and an audio tokenizer to a first checkpoint."""
