"""Data: text comes in, batches go out.

corpus = load_corpus("builtin")                       corpus.py     documents and a report of what was dropped and why
parts = split_corpus(corpus, held_out=0.1)            split.py      by document; near-duplicates stay on one side
tokenizer = train_bpe(texts(parts.train), 2048)       vocabulary.py
folder = prepare_token_folder(parts, tokenizer, root) tokens.py     memory-mapped, verified, re-used by content
source = PackedDocuments(folder.train, 256)           packing.py    rows as a function of (seed, row number)
loader = ShardedLoader(source, batch_size=8, ...)     loader.py     the micro-batches of a rank at a step
held_out = eval_batches(folder.val, ...)              packing.py    every held-out token once, its bytes counted"""
