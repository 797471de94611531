"""Training objectives: modules that hold the model, take a batch and return `contracts.Loss`."""
