"""Modules of Hugging Face `evaluate`, each in a folder of its name, loaded by path: see ../scoring.py."""
