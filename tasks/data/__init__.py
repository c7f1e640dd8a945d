"""Tasks as data: cards, where images come from, data sets of tensors; decoded once, checked before training."""
