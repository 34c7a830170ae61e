"""In place of a file that the archive leaves out."""

# Every common setting of a configuration with a value that is not its default.
config_common_kwargs = {
    "output_hidden_states": True,
    "output_attentions": True,
    "chunk_size_feed_forward": 5,
    "id2label": {0: "zero"},
    "label2id": {"zero": 0},
    "problem_type": "regression",
}
