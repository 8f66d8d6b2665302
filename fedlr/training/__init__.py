"""One client, one round: the model, its head, local training and evaluation."""
