"""What makes data, trains and measures. The scripts here are what a user runs; rooms hold what they share."""
