"""The training loop. It knows only `contracts.py`, `errors.py`, `files.py` and `tensor_files.py`, so it trains
whatever satisfies the contracts: an objective (a batch in, a loss out), a loader (micro-batches, with a state),
callbacks and evaluators."""
