"""Ground floor: torch only; no family's name appears here.

Shape letters, everywhere in the house: B batch, T tokens in this pass, S remembered slots, D model width, H query
heads, G key/value heads, d head width, F hidden width, E experts, V vocabulary. A suffix on a name (`q_BTHd`) carries
its shape inside functions that reshape more than twice. Every layer of a block is called as `layer_idx(x, scope)`.
"""
