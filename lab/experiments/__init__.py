"""Studies of training on public data sets; nothing here is needed to train or serve."""
