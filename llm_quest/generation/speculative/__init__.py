"""Speculative decoding: `decoder` runs it, `rejection_sampler` accepts or rejects drafts, `target_model` scores them in
one pass, `drafters` says what a drafter is (`draft_model`, `mtp_drafter`, `ngram_drafter`), `draft_length` chooses how
many tokens to draft."""
