"""Mistakes that implementations of these families are known to make (reference: architectures.md, sections 0 and 1),
each as one change of text, and where it must be noticed."""

# ruff: noqa: E501

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """title: the mistake. file: under llm_quest/. right -> wrong: the text, which stands there once. tests: files, and
    words after -k."""

    title: str
    file: str
    right: str
    wrong: str
    tests: str


def families(words: str) -> str:
    return f"tests/models/test_families.py -k {words}"


GEMMA, MIXTRAL, QWEN3, DEEPSEEK = families("gemma"), families("mixtral"), families("qwen3_moe"), families("deepseek")
NEXT, MIMO = families("qwen3_next or qwen3_5"), families("mimo")
DELTA, MOE, LATENT = (
    "tests/layers/test_delta_net.py",
    "tests/layers/test_moe.py",
    "tests/layers/test_latent_attention.py",
)
KEPT = "tests/laws/test_cache.py -k 3.5"
VIT, LLAVA = "tests/models/test_vit.py", "tests/models/test_vision_language.py"
HELD_OUT = "tests/recipes/test_mixture.py -k held_out"

CHAT, PREFERENCE = "tests/data/test_chat.py", "tests/objectives/test_preference.py"

LORA = "tests/techniques/test_lora.py"

MUTATIONS = (
    Mutation("Gemma: norms scale by weight, not 1 + weight", "layers/norm.py", "1 + self.weight.to(wide)", "self.weight.to(wide)", GEMMA),
    Mutation("Gemma: embedding not scaled", "models/gemma.py", "config.width, scale=config.width**0.5)", "config.width)", GEMMA),
    Mutation("Gemma: scores by head width, not the scalar", "models/gemma.py", "scale=config.scalar**-0.5", "scale=config.head_width**-0.5", GEMMA),
    Mutation("Gemma 2: attention cap left out", "models/gemma.py", "attend=fused_attention if config.attention_cap is None else capped", "attend=fused_attention", GEMMA),
    Mutation("Gemma 2: cap before the scale", "layers/attention.py", "scores = cap * torch.tanh(scores / cap)", "scores = scale * cap * torch.tanh(scores / scale / cap)", GEMMA),
    Mutation("Gemma 2: cap after the mask", "layers/attention.py", "    if sink is not None:\n        drain", "    if cap is not None:\n        scores = cap * torch.tanh(scores / cap)\n    if sink is not None:\n        drain", GEMMA),
    Mutation("Gemma 2: final cap left out", "models/gemma.py", "cap=config.final_cap", "cap=None", GEMMA),
    Mutation("Gemma: erf GELU", "models/gemma.py", "config.hidden, gelu_tanh)", "config.hidden, __import__('torch').nn.functional.gelu)", GEMMA),
    Mutation("Gemma: post-norm of attention under the pre-norm's name", "models/gemma.py", "{layer}post_attention_layernorm.weight", "{layer}pre_feedforward_layernorm.weight", GEMMA),
    Mutation("Gemma: every layer global", "models/gemma.py", 'None if kind == "full_attention" else window for kind in kinds', "None for kind in kinds", GEMMA),
    Mutation("Gemma 3: local layers with the global rope", "models/gemma.py", "rotary=config.rotary if window is None else config.local_rotary", "rotary=config.rotary", GEMMA),
    Mutation("Gemma 3: linear stretch on the local rope too", "models/gemma.py", "local_rotary=read_rotary(local, head_width)", 'local_rotary=read_rotary(nested(published, "full_attention") | {"rope_theta": 1e4}, head_width)', GEMMA),
    Mutation("Gemma 3: q/k norm after the rotation", "layers/attention.py", "self.rotary(self.q_norm(q), scope), self.rotary(self.k_norm(k), scope)", "self.q_norm(self.rotary(q, scope)), self.k_norm(self.rotary(k, scope))", GEMMA),
    Mutation("window off by one", "scope.py", "seen & (q - k < window)", "seen & (q - k <= window)", GEMMA),
    Mutation("band off by one", "layers/attention.py", "seen.triu(1 - visible.window)", "seen.triu(-visible.window)", GEMMA),
    Mutation("Mixtral: weights not renormalised", "models/mixtral.py", "renormalize=True", "renormalize=False", MIXTRAL),
    Mutation("softmax router: softmax over the chosen alone, without renormalising", "layers/moe.py", "weights, experts = scores.topk(self.top, dim=-1)", "weights, experts = logits.topk(self.top, dim=-1)", MIXTRAL),
    Mutation("Mixtral: w1 and w3 swapped", "models/mixtral.py", 'w1.weight", moe + "experts.{e}.w3', 'w3.weight", moe + "experts.{e}.w1', MIXTRAL),
    Mutation("load balancing normalised to 1", "objectives/routing.py", "* routings[0].scores.shape[1]", "* routings[0].scores.shape[1] / routings[0].experts.shape[1]", MOE),
    Mutation("load balancing: mean of the layers' losses", "objectives/routing.py", "    tokens = sum(routing.real.sum() for routing in routings)", "    if len(routings) > 1:\n        return torch.stack([load_balancing([one]) for one in routings]).mean()\n    tokens = sum(routing.real.sum() for routing in routings)", MOE),
    Mutation("load balancing counts padding", "layers/moe.py", "real = (scope.positions >= 0).expand", "real = (scope.positions >= -1).expand", MOE),
    Mutation("z-loss without the square", "objectives/routing.py", "r.logits.logsumexp(dim=-1).square()", "r.logits.logsumexp(dim=-1)", MOE),
    Mutation("Qwen3 MoE: norm_topk_prob ignored", "models/qwen3.py", "renormalize=sparse.renormalize", "renormalize=not sparse.renormalize", QWEN3),
    Mutation("Qwen3: no q/k norm", "models/qwen3.py", "k_norm=RMSNorm(config.head_width, config.eps)", "k_norm=None", QWEN3),
    Mutation("DeepSeek: halves rotated instead of neighbours", "models/deepseek_v3.py", 'interleaved=published.get("rope_interleave", True)', "interleaved=False", DEEPSEEK),
    Mutation("DeepSeek: no mscale squared on the scores", "models/deepseek_v3.py", "** -0.5 * m * m", "** -0.5", DEEPSEEK),
    Mutation("DeepSeek: temperature on cos and sin instead", "layers/rotary.py", "return temperature(self.factor, self.mscale) / temperature(self.factor, self.mscale_all_dim)", "return temperature(self.factor, self.mscale)", DEEPSEEK),
    Mutation("MLA: scores scaled by the unrotated part alone", "models/deepseek_v3.py", "(self.nope + self.rope) ** -0.5", "self.nope**-0.5", DEEPSEEK),
    Mutation("MLA: rotary key normed with the latent", "layers/latent_attention.py", "remembered = torch.cat((self.kv_norm(c), k_rope), dim=-1)", "remembered = torch.cat((self.kv_norm(c), torch.nn.functional.rms_norm(k_rope, k_rope.shape[-1:])), dim=-1)", DEEPSEEK),
    Mutation("MLA: latent not normed", "layers/latent_attention.py", "torch.cat((self.kv_norm(c), k_rope), dim=-1)", "torch.cat((c * self.kv_norm.weight, k_rope), dim=-1)", DEEPSEEK),
    Mutation("MLA: latents' norms with the config's eps (1e-5)", "layers/latent_attention.py", "EPS = 1e-6", "EPS = 1e-5", DEEPSEEK + " or eps"),
    Mutation("MLA: the cached latent is read with the mask of other tokens (absorbed keys not rotated)", "layers/latent_attention.py", "q = torch.cat((torch.einsum(\"bthn,hnc->bthc\", q_nope, W_uk), q_rope), dim=-1)", "q = torch.cat((torch.einsum(\"bthn,hnc->bthc\", q_nope, W_uk), 0 * q_rope), dim=-1)", DEEPSEEK),
    Mutation("MLA: values taken before the keys in kv_up", "layers/latent_attention.py", "k_nope, v = self.kv_up(c).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], dim=-1)", "v, k_nope = self.kv_up(c).unflatten(-1, (self.heads, -1)).split([self.value, self.nope], dim=-1)", DEEPSEEK),
    Mutation("router: the bias weighs too", "layers/moe.py", "weights = scores.gather(1, experts)", "weights = (scores + self.bias).gather(1, experts)", DEEPSEEK),
    Mutation("router: the bias does not choose", "layers/moe.py", "self.allowed(scores.detach() + self.bias.to(wide))", "self.allowed(scores.detach())", DEEPSEEK),
    Mutation("router: dropped groups are 0 instead of -inf", "layers/moe.py", 'float("-inf")).flatten(1)', "0.0).flatten(1)", MOE),
    Mutation("router: a group's worth is its best expert", "layers/moe.py", "grouped.topk(min(2, grouped.shape[2]), dim=-1)", "grouped.topk(1, dim=-1)", DEEPSEEK),
    Mutation("router: no scale on the weights", "layers/moe.py", "weights * self.scale", "weights", DEEPSEEK),
    Mutation("router: weights not renormalised", "layers/moe.py", "weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)", "pass", DEEPSEEK),
    Mutation("DeepSeek: shared experts left out", "layers/moe.py", "            return out.view_as(x) + always\n", "            return out.view_as(x) + 0 * always\n", DEEPSEEK),
    Mutation("DeepSeek: first layers sparse too", "models/deepseek_v3.py", "dense=dense,", "dense=0,", DEEPSEEK),
    Mutation("MTP: hidden state first, embedding second", "layers/multi_token.py", "torch.cat((self.embed_norm(embedded), self.hidden_norm(h)), dim=-1)", "torch.cat((self.hidden_norm(h), self.embed_norm(embedded)), dim=-1)", families("lookahead")),
    Mutation("MTP: logits from the block's input", "layers/multi_token.py", "self.norm(self.block(self.join(pair), scope))", "self.norm(self.join(pair) + 0 * self.block(self.join(pair), scope))", families("lookahead")),
    Mutation("MTP: the module reads the same token, not the next", "layers/multi_token.py", "return torch.cat((row[:, k:], row.new_full", "return torch.cat((row[:, k - 1 : -1], row.new_full", families("lookahead")),
    Mutation("MTP: counted in held-out loss", "recipes/probes.py", "NextToken(model, lookahead=0.0)", "NextToken(model)", HELD_OUT),
    Mutation("balancing: the bias rises for busy experts", "techniques/expert_bias.py", "torch.sign(load.mean() - load)", "torch.sign(load - load.mean())", MOE),
    Mutation("balancing: also in evaluation", "objectives/next_token.py", "        if self.model.training:\n            note_loads(routings)", "        note_loads(routings)", HELD_OUT),
    Mutation("balancing: the bias becomes bfloat16 with the model", "layers/moe.py", 'if before.device.type != "meta" and self.bias.dtype != before.dtype:', "if False:", MOE),
    Mutation("Qwen3-Next: query and gate as halves of the projection", "layers/attention.py", "q, gate = q.chunk(2, dim=-1) if self.gated else (q, None)", "q, gate = (part.unflatten(-1, (self.heads, -1)) for part in q.flatten(2).chunk(2, dim=-1)) if self.gated else (q, None)", NEXT),
    Mutation("Qwen3-Next: output not gated", "layers/attention.py", "mixed * gate.sigmoid()", "mixed * gate.sigmoid().detach() ** 0", NEXT),
    Mutation("Qwen3-Next: rotation over the whole head", "models/qwen3_next.py", "rotary=read_rotary(published, int(head_width * fraction))", "rotary=read_rotary(published, head_width)", NEXT),
    Mutation("rotation's exponents divide by the head's width", "layers/rotary.py", "device=\"cpu\") / width)\n\n\n@dataclass(frozen=True)\nclass Linear", "device=\"cpu\") / (4 * width))\n\n\n@dataclass(frozen=True)\nclass Linear", NEXT),
    Mutation("Qwen3-Next: shared expert not gated", "layers/moe.py", "always if self.shared_gate is None else always * self.shared_gate(x).sigmoid()", "always", NEXT),
    Mutation("DeltaNet: its norm scales by 1 + weight", "layers/delta_net.py", "gated = self.norm(o) *", "gated = (self.norm(o) + torch.nn.functional.rms_norm(o, o.shape[-1:])) *", NEXT),
    Mutation("DeltaNet: gate before the norm", "layers/delta_net.py", "gated = self.norm(o) * F.silu(z.unflatten(-1, (self.value_heads, -1)).to(wide))", "gated = self.norm(o * F.silu(z.unflatten(-1, (self.value_heads, -1)).to(wide)))", NEXT),
    Mutation("DeltaNet: key heads tiled instead of repeated", "layers/delta_net.py", "x.repeat_interleave(self.value_heads // self.key_heads, dim=2)", "x.repeat(1, 1, self.value_heads // self.key_heads, 1)", NEXT),
    Mutation("DeltaNet: keys not normalised", "layers/delta_net.py", "return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)", "return x", NEXT),
    Mutation("DeltaNet: query not scaled", "layers/delta_net.py", "rule(q * self.key_width**-0.5,", "rule(q,", NEXT),
    Mutation("DeltaNet: convolution's taps the other way round", "layers/delta_net.py", "taps = self.conv[:, 0].to(columns.dtype)", "taps = self.conv[:, 0].to(columns.dtype).flip(-1)", NEXT),
    Mutation("DeltaNet: no SiLU after the convolution", "layers/delta_net.py", "        return F.silu(y)\n", "        return y\n", NEXT),
    Mutation("DeltaNet: decay after the correction", "layers/delta_net.py", "        state = state * g[:, t, :, None, None].exp()\n        error", "        state = state * 1.0\n        error", DELTA),
    Mutation("DeltaNet: the error looks up before fading", "layers/delta_net.py", 'error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])', 'error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state / g[:, t, :, None, None].exp(), k[:, t])', DELTA),
    Mutation("DeltaNet: exponential before the mask", "layers/delta_net.py", '.masked_fill(~kept, float("-inf")).exp()', ".exp().masked_fill(~kept, 0.0)", DELTA),
    Mutation("DeltaNet: padding fades", "layers/delta_net.py", "beta, g = beta * real[..., None], g * real[..., None]", "beta = beta * real[..., None]", KEPT),
    Mutation("DeltaNet: padding writes", "layers/delta_net.py", "beta, g = beta * real[..., None], g * real[..., None]", "g = g * real[..., None]", KEPT),
    Mutation("DeltaNet: the convolution crosses documents", "layers/delta_net.py", "shifted = shifted * same[..., None]", "pass", DELTA),
    Mutation("DeltaNet: the state crosses documents", "layers/delta_net.py", "kept = lower if same is None else lower & same.pairs", "kept = lower", DELTA),
    Mutation("DeltaNet: the cache forgets the convolution's columns", "layers/delta_net.py", 'return kept["columns"], kept["state"]', 'return torch.zeros_like(kept["columns"]), kept["state"]', NEXT),
    Mutation("MiMo: sliding_window_size counts the token itself", "models/mimo.py", "if previous is None else previous + 1", "if previous is None else previous", "tests/models/test_page.py -k mimo"),
    Mutation("MiMo: hybrid_layer_pattern ignored", "models/mimo.py", 'each_layer(published, "hybrid_layer_pattern", layers, 0, 1) or', "None or", "tests/models/test_page.py -k mimo"),
    Mutation("MiMo: values not scaled", "models/mimo.py", "return x * self.factor", "return x", MIMO),
    Mutation("MiMo: sinks in global layers too", "models/mimo.py", "sinks=window is not None", "sinks=True", MIMO),
    Mutation("sinks bring a value of their own weight (column kept)", "layers/attention.py", "F.pad(part, (0, 0, 0, 0, 0, 1)).transpose(1, 2) for part in (k, v)", "torch.cat((part, part[:, -1:]), dim=1).transpose(1, 2) for part in (k, v)", MIMO),
    Mutation("MiMo: windowed layers with the global key/value heads", "models/mimo.py", 'published.get("swa_num_key_value_heads") or 2 * groups', "groups", MIMO),
    Mutation("MiMo: one rope for all layers", "models/mimo.py", "local_rotary=read_rotary(local, width)", "local_rotary=read_rotary(full, width, 5_000_000.0)", MIMO),
    Mutation("MiMo: modules' second norm under DeepSeek's name", "models/mimo.py", '"block.ffn.norm": "pre_mlp_layernorm"', '"block.ffn.norm": "post_attention_layernorm"', MIMO),
    Mutation("MiMo: modules are global", "models/mimo.py", "attention(config, config.window)), Sublayer", "attention(config, config.window + 100)), Sublayer", MIMO),
    Mutation("LatentMoE: shared expert left out", "layers/moe.py", "self.down(mixed).view_as(x) + self.shared(x, scope)", "self.down(mixed).view_as(x) + 0 * self.shared(x, scope)", MOE),
    Mutation("LatentMoE: ReLU instead of its square", "layers/moe.py", "return F.relu(h).square()", "return F.relu(h)", MOE),
    Mutation("grouped experts: sum in the sorted order", "layers/grouped.py", "y.index_select(0, back).unflatten", "y.unflatten", MOE),
    Mutation("grouped experts: weights in the tokens' order", "layers/moe.py", "weights.flatten().index_select(0, sorting.order)", "weights.flatten()", MOE),
    Mutation("ViT: tanh GELU", "models/vit.py", "MLP(config.width, config.hidden, F.gelu, bias=True)", 'MLP(config.width, config.hidden, lambda x: F.gelu(x, approximate="tanh"), bias=True)', VIT),
    Mutation("ViT: eps 1e-6 where the config is silent", "models/vit.py", 'published.get("layer_norm_eps", 1e-12)', 'published.get("layer_norm_eps", 1e-6)', VIT),
    Mutation("ViT: the class token has no position", "layers/patches.py", "self.dropout(torch.cat((start, x), dim=1) + self.positions)", "self.dropout(torch.cat((start, x + self.positions[1:]), dim=1))", VIT + " tests/layers/test_patches.py"),
    Mutation("ViT: patches column by column", "layers/patches.py", "cut.permute(0, 2, 4, 1, 3, 5)", "cut.permute(0, 4, 2, 1, 3, 5)", VIT + " tests/layers/test_patches.py"),
    Mutation("ViT: causal", "models/image_encoder.py", "Scope.plain(x, ahead=True)", "Scope.plain(x)", VIT),
    Mutation("ViT: positions of another size cut off", "layers/patches.py", 'mode="bicubic", align_corners=False', 'mode="bicubic", align_corners=True', VIT + " tests/layers/test_patches.py"),
    Mutation("CLIP: plain GELU", "models/clip.py", "config.hidden, quick_gelu, bias=True", "config.hidden, __import__('torch').nn.functional.gelu, bias=True", VIT + " " + LLAVA),
    Mutation("LLaVA: the last layer instead of the one before", "models/fusion.py", "self.tower.stream(images, self.config.depth)", "self.tower.stream(images)", LLAVA),
    Mutation("LLaVA: class token shown, the last patch not", "models/fusion.py", "seen if self.config.keep_class else seen[:, 1:]", "seen if self.config.keep_class else seen[:, :-1]", LLAVA),
    Mutation("LLaVA: tanh GELU in the adapter", "layers/adapter.py", "F.gelu(self.up(x))", 'F.gelu(self.up(x), approximate="tanh")', LLAVA),
    # Fine-tuning and preferences (alignment.md, section 2)
    Mutation("what somebody types is read as a control token", "data/chat.py", 'self.spelled.sub(guard, message["content"].replace(GUARD, ""))', 'message["content"]', CHAT),
    Mutation("prompt and answer are encoded as one text", "data/chat.py", "for start, upto, mine in ((at, begin, False), (begin, end, True)):", "for start, upto, mine in ((at, end, True),):", CHAT),
    Mutation("the answer's end is not learned", "data/chat.py", "return len(answer.rstrip()) if self.closed(answer.rstrip()) else len(answer)", "return len(answer.rstrip()) - len(self.spelled.findall(answer)[-1]) if self.closed(answer.rstrip()) else len(answer)", CHAT),
    Mutation("targets are not shifted against what is learned", "data/instructions.py", "np.where(learned[1 : size + 1], ids[1 : size + 1], IGNORE)", "np.where(learned[:size], ids[1 : size + 1], IGNORE)", "tests/data/test_instructions.py"),
    Mutation("packed conversations count positions on", "data/instructions.py", "ids[:size], np.arange(size), segment", "ids[:size], np.arange(at, at + size), segment", "tests/data/test_instructions.py"),
    Mutation("the same question with another answer is held out", "data/conversations.py", "groups[question_hash(item.prompt)].append(number)", "groups[str(number)].append(number)", "tests/data/test_conversations.py"),
    Mutation("an answer is cut to fit, not its question", "data/preferences.py", "kept.append(Rated(prompt[-room:], answers, one.margin, one.where))", "kept.append(Rated(prompt, tuple(a[: length - len(prompt)] for a in answers), one.margin, one.where))", "tests/data/test_preferences.py"),
    Mutation("log-probabilities ignore the temperature", "objectives/log_probs.py", "z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature", "z = z if cap is None else cap * torch.tanh(z / cap)", "tests/objectives/test_log_probs.py"),
    Mutation("the chunked gradient forgets the temperature", "objectives/log_probs.py", "    g /= temperature\n", "", "tests/objectives/test_log_probs.py"),
    Mutation("DPO: means over tokens in place of sums", "objectives/preference.py", "return token_log_probs(model, batch.rows).sum(dim=1)", "return token_log_probs(model, batch.rows).sum(dim=1) / (batch.targets != IGNORE).sum(dim=1)", PREFERENCE),
    Mutation("DPO: rewards logged without beta", "objectives/preference.py", "now.detach(), self.beta * gained.detach()", "now.detach(), gained.detach()", PREFERENCE),
    Mutation("DPO: dropout stays on", "objectives/preference.py", "    if model.training:\n        model.eval()\n", "", PREFERENCE),
    Mutation("cDPO is computed as robust DPO", "objectives/preference.py", '"cdpo": Form(cdpo, flips=True)', '"cdpo": Form(robust, flips=True)', PREFERENCE),
    Mutation("flips accepted and never read", "objectives/preference.py", "if not LOSSES[loss].flips and flips:", "if False:", PREFERENCE),
    Mutation("K ranked answers weigh as many pairs", "data/pairs.py", "2 / (K * (K - 1))", "1.0", "tests/objectives/test_reward_model.py"),
    Mutation("the reward is read at the last column, padding or not", "objectives/last_outputs.py", "last = positions.argmax(dim=1)", "last = torch.full_like(positions[:, 0], -1)", "tests/objectives/test_reward_model.py"),
    Mutation("the reward ignores the margin", "objectives/reward_model.py", "-logsigmoid(better - worse - margins)", "-logsigmoid(better - worse)", "tests/objectives/test_reward_model.py"),
    Mutation("a resumed run forgets its moving reference", "recipes/reference.py", "mine.copy_(saved[name])", "pass", "tests/recipes/test_preferring.py -k resumed"),
    Mutation("macro F1 weighed by how common a class is", "recipes/classify.py", "float(np.mean([f1(said == c, labels == c) for c in range(classes) if (labels == c).any()]))", "float(np.average([f1(said == c, labels == c) for c in range(classes)], weights=np.bincount(labels, minlength=classes)))", "tests/recipes/test_classify.py -k hand"),
    Mutation("warm-up: Ctrl-C ends a chunk and not the warm-up", "recipes/warmup.py", 'done.status == "interrupted"', 'done.status == "never"', "tests/recipes/test_grpo.py -k warm_up_stops"),
    # Adapters and int8 (architectures.md 4.7)
    Mutation("adapter: rsLoRA scaled by 1/r", "techniques/lora.py", "self.alpha / math.sqrt(self.rank)", "self.alpha / self.rank", LORA),
    Mutation("adapter: dropout on the base's input too", "layers/low_rank.py", "return plain + self.update(self.dropout(x))", "return self.dropout(plain) + self.update(self.dropout(x))", LORA),
    Mutation("adapter: DoRA's norm of columns", "layers/low_rank.py", ".norm(dim=-1).to(weight.dtype)", ".norm(dim=-2).mean().expand(weight.shape[:-1]).to(weight.dtype)", LORA),
    Mutation("adapter: DoRA's norm has a gradient", "layers/low_rank.py", "        with torch.no_grad():\n            norm = row_norms", "        if True:\n            norm = row_norms", "tests/hub/test_adapters.py -k dora-llama"),
    Mutation("adapter: unmerging subtracts nothing", "techniques/lora.py", 'setattr(wrapper.base, name, record.originals[f"{path}.{name}"])', "pass", LORA),
    Mutation("adapter: off, its matrix is still the edited one", "layers/low_rank.py", "return self.edit.edited(self.base.weight) if self.on else self.base.weight", "return self.edit.edited(self.base.weight)", "tests/techniques/test_lora.py -k off_everywhere"),
    Mutation("adapter: the base goes on learning", "techniques/lora.py", "    model.requires_grad_(False)\n    wrap", "    wrap", LORA),
    Mutation("adapter: parts of a published matrix share B's columns", "hub/peft.py", "        column += one.A.shape[0]\n", "", "tests/hub/test_adapters.py -k gives_the_same_logits_in_peft"),
    Mutation("int8: one scale for the whole matrix", "layers/int8.py", "wide.abs().amax(dim=-1) / 127", "wide.abs().amax().expand(wide.shape[:-1]) / 127", "tests/techniques/test_int8.py"),
    Mutation("a saved technique is taken for the plain model", "hub/config.py", "    if is_published(techniques):", "    if True:", "tests/recipes/test_techniques.py -k transformers"),
)  # fmt: skip
