"""What the example scripts share: the models, the data and the training loop."""
