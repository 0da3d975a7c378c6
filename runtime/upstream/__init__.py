"""Another service as full depth: it answers the texts that no exit of the model is sure of."""
