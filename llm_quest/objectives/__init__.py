"""Third floor: a batch in, a loss out. Every objective is a module that holds the model and returns
`contracts.Loss`."""
