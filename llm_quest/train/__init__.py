"""The training loop. It knows only `contracts.py`, `errors.py`, `files.py`, `tensor_files.py` and the machine, so it
trains whatever satisfies the contracts: an objective (a batch in, a loss out), a loader (micro-batches, with a state),
callbacks and evaluators."""
