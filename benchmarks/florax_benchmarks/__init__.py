"""What the benchmark scripts share: models, ways to train, timing, and the file of results."""
