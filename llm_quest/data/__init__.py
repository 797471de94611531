"""First floor: text comes in, batches go out.

corpus = gather("builtin")                        corpus.py     documents and a ledger of what was dropped and why
parts = split(corpus, held_out=0.1)               split.py      by document; near-duplicates stay on one side
tokenizer = train_bpe(texts(parts.train), 2048)   tokenizer.py
folder = prepare(parts, tokenizer, root)          tokens.py     memory-mapped, verified, re-used by content
feed = PackedFeed(folder.train, ...)              packing.py    the batch at a step is a function of (seed, step)
held = eval_batches(folder.val, ...)              held_out.py   every held-out token once, its bytes counted
rows = baselines(parts.train, parts.val)          baselines.py  what counting and compressing reach on those bytes
"""
