"""Fourth floor: the engine. It knows `contracts.py`, `errors.py`, `files.py` and `tensor_files.py` and nothing else of
ours, so it trains whatever keeps the promises: an objective (a batch in, a loss out), a feed (micro-batches with a
bookmark), callbacks and probes."""
