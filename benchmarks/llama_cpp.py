"""Decoding one row on one thread against llama.cpp, in turn, in one process, on the same weights: float32, 8 bits (its
Q8_0, our int8) and 4 bits (its Q4_0, our int4; the tied head has 8 bits in both).

A token's time is the CPU time of all threads for WHOLE tokens less that for SHORT ones, so the prompt does not count.
Needs the extra `bench` (xllamacpp, gguf). An AVX2 machine: ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2.

--products: the form of float32's products, auto by this machine's profile.

OMP_NUM_THREADS=1 python -m benchmarks.llama_cpp [--shape 124m-llama] [--kinds f32 q8_0 q4_0] [--pairs 5] [--compile]
                                                 [--products auto plain kernel]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llm_quest as quest
from benchmarks.generation import PROMPT, SHAPES
from llm_quest.cli.chat import use_fast_products
from llm_quest.hub.weight_map import export_weight_map, weight_views
from llm_quest.layers.linear import KERNEL_ROWS, set_few_row_products
from llm_quest.models.build import family_of
from llm_quest.models.decoder import Decoder
from llm_quest.techniques.quantize import Quantize

FORMATS = {"f32": None, "q8_0": "int8", "q4_0": "int4"}
"""What llama.cpp calls a kind of weights, and what we call it."""
SHORT = 4
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Decoder, path: Path, kind: str) -> None:
    """A Llama model as a GGUF file with a vocabulary of made-up tokens."""
    import gguf

    c: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, c.max_position_embeddings),
        (writer.add_embedding_length, c.hidden_size),
        (writer.add_block_count, c.num_hidden_layers),
        (writer.add_feed_forward_length, c.intermediate_size),
        (writer.add_head_count, c.num_attention_heads),
        (writer.add_head_count_kv, c.num_key_value_heads),
        (writer.add_rope_dimension_count, c.head_dim),
        (writer.add_layer_norm_rms_eps, c.rms_norm_eps),
        (writer.add_rope_freq_base, c.rotary.rope_theta),
        (writer.add_vocab_size, c.vocab_size),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "gpt-2"),
        (writer.add_token_list, [f"t{number}" for number in range(c.vocab_size)]),
        (writer.add_token_types, [1] * c.vocab_size),
        (writer.add_token_merges, ["t 0"]),
    ):
        add(value)
    for name, tensor in published_tensors(model).items():
        ours, numbers = gguf_name(name), tensor.detach().contiguous().numpy()
        if kind == "f32" or "norm" in ours:
            writer.add_tensor(ours, numbers)
            continue
        in_head = kind == "q4_0" and ours in ("token_embd.weight", "output.weight")
        stored = getattr(gguf.GGMLQuantizationType, "Q8_0" if in_head else kind.upper())
        writer.add_tensor(ours, gguf.quants.quantize(numbers, stored), raw_dtype=stored)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def published_tensors(model: Decoder) -> dict[str, Tensor]:
    """The tensors by their published names; q and k with their rotary halves interleaved, as llama.cpp has them."""
    parameters, config = dict(model.named_parameters()), model.config
    views = weight_views(model, export_weight_map(model, family_of(config).weight_map(config)))
    found = {name: place.view(parameters[place.parameter]) for name, place in views.items()}
    for name, tensor in found.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.unflatten(0, (tensor.shape[0] // config.head_dim, 2, -1))  # type: ignore[attr-defined]
            found[name] = halves.transpose(1, 2).flatten(0, 2)
    return found


def gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in MODEL_NAMES:
        return f"{MODEL_NAMES[module]}.weight"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[inner]}.weight"


def llama_decoder(path: Path, prompt: list[int]) -> Callable[[int], None]:
    """A function that decodes so many tokens with llama.cpp on one thread."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def decode(tokens: int) -> None:
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        assert answer["timings"]["predicted_n"] == tokens, answer

    return decode


def our_decoder(model: Decoder, prompt: list[int], compile: bool) -> Callable[[int], None]:
    def decode(tokens: int) -> None:
        quest.generate(model, [prompt], max_new_tokens=tokens, temperature=0.0, eos_token_id=(), compile=compile)

    return decode


def token_seconds(decode: Callable[[int], None], whole: int) -> float:
    start = time.process_time()
    decode(SHORT)
    short = time.process_time()
    decode(whole)
    return (time.process_time() - short - (short - start)) / (whole - SHORT)


def set_products(form: str) -> str:
    """Set the form of products for the whole process, and say which one a single row has."""
    if form == "auto":
        use_fast_products("float32", print)
    else:
        kernel = {"float32": (1, 65)} if form == "kernel" else {}
        assert not set_few_row_products({}, kernel)
    return "kernel" if 1 in KERNEL_ROWS.get(torch.float32, ()) else "plain"


def compare(shape: str, kind: str, pairs: int, compile: bool, folder: Path) -> str:
    """One row of the table."""
    config = SHAPES[shape][1]
    prompt = torch.randint(0, config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    model, whole = quest.build(config, seed=0), SHORT + (128 if shape == "11m" else 32)
    write_gguf(model, folder / f"{kind}.gguf", kind)
    ours = model if FORMATS[kind] is None else Quantize(FORMATS[kind])(model)  # type: ignore[arg-type]
    decoders = [llama_decoder(folder / f"{kind}.gguf", prompt), our_decoder(ours, prompt, compile)]
    for decode in decoders * 2:
        decode(SHORT)
    rounds = [[token_seconds(decode, whole) for decode in decoders] for _ in range(pairs)]
    ratios = sorted(theirs / mine for theirs, mine in rounds)
    theirs, mine = (1 / statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return f"| {shape}, {kind}, {'compiled' if compile else 'eager'} | {theirs:.1f} | {mine:.1f} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["11m", "124m-llama"])
    parser.add_argument("--kinds", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--products", choices=["auto", "plain", "kernel"], default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"float32's products of one row: {set_products(options.products)}\n")
    print("| shape, weights, step | llama.cpp, tokens/s | ours | times llama.cpp (range) |\n| --- | --- | --- | --- |")
    for shape in [options.shape] if options.shape else ["11m", "124m-llama"]:
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as folder:
                print(compare(shape, kind, options.pairs, options.compile, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
