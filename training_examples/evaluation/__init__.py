"""What is measured and how: figures with their counts, recognisers."""
