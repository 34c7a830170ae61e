"""The paper's comparisons, measured again at a size that two cores can carry; README.md says what came out."""
