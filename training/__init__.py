"""DE3-BERT in PyTorch: model, data, training loop, evaluation."""
