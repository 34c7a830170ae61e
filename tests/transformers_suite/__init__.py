"""Transformers' own test mixins, applied to the classes of this repository; see README.md."""
