"""An OpenAI-compatible server. `cache_rows` keeps running requests as rows of one cache, `prefix_cache` keeps the rows
of finished ones, `batch` runs the model (continuous batching), `engine` is the thread and the queue; `protocol` parses
requests, `responses` writes answers, `security` guards the routes of `app`, and `server` starts it all."""
