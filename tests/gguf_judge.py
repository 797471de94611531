"""llama.cpp as the judge of exported files: `LlamaCpp(file)` decodes greedily and gives the log-probabilities of the
whole vocabulary at every step, without flash attention and with a float32 cache, so that its numbers are those of
float32 (with both, keys and values are rounded to float16)."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.layers.feed_forward import gelu_tanh
from llm_quest.models.decoder import Decoder

FLOAT32_CACHE = 0  # ggml's number of the type


class LlamaCpp:
    """A GGUF file in llama.cpp, on one thread. The reason for a file that is refused is on stderr."""

    def __init__(self, file: Path, context: int = 256, lora: Path | None = None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_batch, params.warmup, params.verbosity = context, 1, context, False, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: list[int], tokens: int, top: int) -> tuple[list[int], list[dict[int, float]]]:
        """Greedy ids, and at each step the log-probabilities of the `top` best tokens by id."""
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "cache_prompt": False, "n_probs": top}
        steps = self.server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        found = [{one["id"]: one["logprob"] for one in step["top_logprobs"]} for step in steps]
        return [step["id"] for step in steps], found

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, over the server's loopback address."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return list(json.load(answer)["tokens"])


def word_tokenizer(size: int) -> Tokenizer:
    """A tokenizer whose tokens are ASCII words: llama.cpp holds back tokens that form no whole character."""
    backend = Backend(models.BPE(vocab={f"t{number}": number for number in range(size - 1)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, eos_tokens=["<|endoftext|>"])


def compare_distributions(model: Decoder, judge: LlamaCpp, ids: list[int], every: int = 1) -> float:
    """The largest difference of log-probabilities (above -20) behind every prefix of these ids, or each `every`-th."""
    size, worst = model.config.vocab_size, 0.0
    ours = our_log_probs(model, ids)
    for length in range(1, len(ids) + 1, every):
        _, steps = judge.complete(ids[:length], 1, size)
        theirs = torch.full((size,), -torch.inf)
        theirs[list(steps[0])] = torch.tensor(list(steps[0].values()))
        row = ours[length - 1]
        seen = (theirs > -20) & (row > -20)
        worst = max(worst, float((theirs - row)[seen].abs().max()))
    return worst


def ggml_gelu(x: Tensor) -> Tensor:
    """llama.cpp's GELU: the tanh form, from a table with float16 on either side; exact beyond 10."""
    table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x.abs() >= 10, x.clamp(min=0), table)


def with_ggml_gelu(model: Decoder) -> Decoder:
    """The model with llama.cpp's GELU in place of the exact one and of the tanh form, in place."""
    for module in model.modules():
        if getattr(module, "activation", None) in (torch.nn.functional.gelu, gelu_tanh):
            module.activation = ggml_gelu  # type: ignore[assignment]
    return model


def our_log_probs(model: Decoder, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).log_softmax(dim=-1)[0]


def randomize_for_judging(model: Any, seed: int = 0) -> Any:
    """Random norms, biases and sinks; matrices so large that attention matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or name.endswith(("_bias", "sink")):
                parameter.add_(0.3 * noise)
            else:
                fan_in = parameter.shape[-1]
                parameter.copy_(noise * fan_in**-0.5)
    return model.eval()
