"""Training loop: what is around ``transformers.Trainer`` while the weights of one run are fitted."""
