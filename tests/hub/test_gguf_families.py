"""Every family that llama.cpp knows: out into a GGUF file and back, and what is refused."""

from __future__ import annotations

import json
import re

import gguf
import pytest
import torch

import llm_quest as quest
from llm_quest.errors import DataError, UsageError
from llm_quest.files import to_json
from llm_quest.hub.gguf import array, float32, read_gguf, string, uint32, write_gguf
from llm_quest.hub.gguf_export import save_gguf
from llm_quest.hub.gguf_families import BY_MODEL_TYPE, LAYOUTS
from llm_quest.hub.gguf_layouts import OPTIONAL
from llm_quest.hub.inspect import inspect_folder
from llm_quest.hub.load_save import load, save
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.layers.norm import ZeroCenteredRMSNorm
from llm_quest.models import FAMILIES
from llm_quest.models.build import family_of
from llm_quest.models.decoder import GenerationConfig
from llm_quest.techniques.lora import LoRA
from llm_quest.techniques.softcap import SoftCap
from tests.gguf_judge import our_log_probs, randomize_for_judging, word_tokenizer
from tests.gguf_models import GGUF_MODELS, VOCAB, replace, tiny
from tests.hub.test_gguf import data

IDS = torch.randint(0, VOCAB - 1, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def export(name: str, file, **options):
    model = randomize_for_judging(quest.build(GGUF_MODELS[name](), seed=0))
    return model, save_gguf(model, word_tokenizer(VOCAB), file, **options)


def test_every_layout_has_a_model():
    models = {family_of(make()).publish(make())["model_type"] for make in GGUF_MODELS.values()}
    assert models | {"ministral"} == set(BY_MODEL_TYPE)


def test_every_family_is_written_or_refused_by_name():
    refused = {kind for family in FAMILIES for kind in family.architectures if kind not in BY_MODEL_TYPE}
    assert refused == set()


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_a_file_computes_what_its_model_computes(name, tmp_path):
    """To the last bit: in float32, all weights but those of 1 + w are the same."""
    model, _ = export(name, tmp_path / "m.gguf")
    back = load(tmp_path / "m.gguf")
    assert torch.equal(our_log_probs(back, IDS), our_log_probs(model, IDS))
    assert (back.generation_config.eos_token_ids, back.config.vocab_size) == ((VOCAB - 1,), VOCAB)


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_names_are_those_of_the_package(name, tmp_path):
    _, report = export(name, tmp_path / "m.gguf", dtype="f16")
    (arch,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == report.architecture)
    known = {gguf.TENSOR_NAMES[one].replace("{bid}", "0") for one in gguf.MODEL_TENSORS[arch]}
    known |= {
        "rope_freqs",
        "rope_factors_long",
        "rope_factors_short",
        "blk.0.ssm_ba",
        "blk.0.attn_k_b",
        "blk.0.attn_v_b",
    }
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    short = {re.sub(r"^blk\.\d+\.", "blk.0.", tensor.name) for tensor in reader.tensors}
    assert {re.sub(r"\.(weight|bias)$", "", one) for one in short} <= known
    kinds = {tensor.name: gguf.GGMLQuantizationType(tensor.tensor_type).name for tensor in reader.tensors}
    assert {kinds[one] for one in kinds if "norm" in one or one.endswith(".bias") or "inp" in one} <= {"F32"}
    assert kinds["token_embd.weight"] == "F16"


@pytest.mark.parametrize("name", ["llama, llama3", "gemma3", "deepseek_v3", "qwen3_5", "gpt_oss", "mimo"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16", "f16"])
def test_other_types_load_as_the_package_decodes_them(name, kind, tmp_path):
    options = {"quantize": kind} if kind.startswith("q") else {"dtype": kind}
    export(name, tmp_path / "m.gguf", **options)
    _, _ = export(name, tmp_path / "plain.gguf")
    decoded, packed, plain = gguf.GGUFReader(tmp_path / "m.gguf"), {}, read_gguf(tmp_path / "plain.gguf")
    for tensor in decoded.tensors:
        wide = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        packed[tensor.name] = data(wide.view(plain.tensors[tensor.name].shape), "F32")
    write_gguf(tmp_path / "decoded.gguf", plain.metadata, packed)
    read = load(tmp_path / "m.gguf", dtype="float32")
    assert torch.equal(our_log_probs(read, IDS), our_log_probs(load(tmp_path / "decoded.gguf"), IDS))
    used = {gguf.GGMLQuantizationType(tensor.tensor_type).name for tensor in decoded.tensors}
    assert kind.upper() in used


def test_a_bfloat16_folder_keeps_its_numbers(tmp_path):
    model = quest.build(tiny("qwen3"), seed=0, dtype="bfloat16")
    tokenizer = word_tokenizer(VOCAB)
    save(model, tmp_path / "folder", tokenizer=tokenizer)
    assert save_gguf(load(tmp_path / "folder"), tokenizer, tmp_path / "m.gguf").dtype == "BF16"
    read = load(tmp_path / "m.gguf")
    assert {parameter.dtype for parameter in read.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, read.get_parameter(name)), name


def test_weights_that_are_changed_in_the_file_come_back_within_their_rounding(tmp_path):
    model, _ = export("gemma3", tmp_path / "m.gguf")
    read = load(tmp_path / "m.gguf")
    norms = [path for path, module in model.named_modules() if isinstance(module, ZeroCenteredRMSNorm)]
    for path, parameter in model.named_parameters():
        limit = 1e-6 if path.rpartition(".")[0] in norms else 0.0
        assert (parameter - read.get_parameter(path)).abs().max() <= limit, path


def test_a_quantized_matrix_whose_rows_no_block_divides_is_float16(tmp_path):
    export("olmo2", tmp_path / "m.gguf", quantize="q4_0")
    kinds = {name: tensor.dtype for name, tensor in read_gguf(tmp_path / "m.gguf").tensors.items()}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q4_0")  # rows of 48 and of 64


def test_what_generation_needs_comes_back(tmp_path):
    model = quest.build(tiny("llama3.2"), seed=0)
    model.generation_config = GenerationConfig(None, (319, 7), None, temperature=0.5, top_k=20, top_p=0.75)
    save_gguf(model, word_tokenizer(VOCAB), tmp_path / "m.gguf", name="my model")
    read, file = load(tmp_path / "m.gguf").generation_config, read_gguf(tmp_path / "m.gguf")
    assert (read.eos_token_ids, read.temperature, read.top_k, read.top_p) == ((319, 7), 0.5, 20, 0.75)
    assert file.get("general.name") == "my model"
    save_gguf(model, word_tokenizer(VOCAB), tmp_path / "m.gguf", name="my-phi-3", overwrite=True)
    assert not read_gguf(tmp_path / "m.gguf").get("general.name")


def test_a_window_that_llama_cpp_lacks_shortens_the_context(tmp_path):
    model = quest.build(tiny("mistral"), seed=0)
    report = save_gguf(model, word_tokenizer(VOCAB), tmp_path / "m.gguf")
    assert "context_length is 5" in report.notes[0]
    assert load(tmp_path / "m.gguf").config.max_position_embeddings == 5
    assert torch.equal(our_log_probs(load(tmp_path / "m.gguf"), IDS[:5]), our_log_probs(model, IDS[:5]))


REFUSED = {
    "smollm3": ("smollm3", "no_rope_layers"),
    "gemma2": ("gemma2", "query_pre_attn_scalar is 20, llama.cpp divides by 16"),
    "olmoe": ("olmoe", "clip_qkv is 1.5"),
    "qwen3-moe": ("qwen3-moe", "mlp_only_layers"),
    "gpt-oss": ("gpt-oss", "swiglu_limit is 0.5"),
    "deepseek-v2": ("deepseek-v2", "group_limited_greedy"),
    "qwen3.5": ("qwen3.5", "heads of unlike width"),
    "exaone4": ("exaone4", "sliding_window is 5"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused_by_the_field(kind, tmp_path):
    name, words = REFUSED[kind]
    with pytest.raises(UsageError) as raised:
        save_gguf(quest.build(tiny(name), seed=0), word_tokenizer(VOCAB), tmp_path / "m.gguf")
    assert words in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_techniques_and_wrong_options_are_refused(tmp_path):
    model, tokenizer = quest.build(tiny("llama3.2"), seed=0), word_tokenizer(VOCAB)
    for options, words in (({"quantize": "q5_k"}, "q8_0, q4_0"), ({"dtype": "int8"}, "f32")):
        with pytest.raises(UsageError, match=words):
            save_gguf(model, tokenizer, tmp_path / "m.gguf", **options)
    wide = replace(tiny("qwen2"), head_dim=16, rotary=replace(tiny("qwen2").rotary, dim=16))
    with pytest.raises(UsageError, match=r"heads of 16 on 48"):
        save_gguf(quest.build(wide), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="LoRA"):
        save_gguf(LoRA(rank=2)(model), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="SoftCap"):
        save_gguf(SoftCap(30.0)(quest.build(tiny("llama3.2"))), tokenizer, tmp_path / "m.gguf")


def rewrite_gguf(source, target, *, keys=None, drop=(), tensors=None):
    """A file with other keys or tensors."""
    file = read_gguf(source)
    metadata = {key: value for key, value in file.metadata.items() if key not in drop} | (keys or {})
    kept = {
        name: data(torch.from_numpy(tensor.data.copy()), "F32")
        for name, tensor in ((one.name, one) for one in gguf.GGUFReader(source).tensors)
    }
    write_gguf(target, metadata, {name: one for name, one in kept.items() if name not in drop} | (tensors or {}))


CHANGED = {
    "a key is missing": ({"drop": ("llama.block_count",)}, "llama.block_count is missing"),
    "a key of another type": ({"keys": {"llama.block_count": string("two")}}, "one number was expected"),
    "not a number": ({"keys": {"llama.rope.freq_base": float32(float("nan"))}}, "where a number is expected"),
    "an unknown key": ({"keys": {"llama.new_trick": uint32(1)}}, "new_trick"),
    "a window": ({"keys": {"llama.attention.sliding_window": uint32(8)}}, "has none"),
    "another family": ({"keys": {"general.architecture": string("mamba")}}, "'mamba'"),
    "an adapter": ({"keys": {"general.type": string("adapter")}}, "is no model"),
    "a tensor is missing": ({"drop": ("blk.1.ffn_up.weight",)}, "missing: blk.1.ffn_up.weight"),
    "a tensor too many": ({"tensors": {"blk.0.odd.weight": data(torch.zeros(4), "F32")}}, "unexpected: blk.0.odd"),
    "a wrong shape": ({"tensors": {"blk.1.attn_norm.weight": data(torch.zeros(4), "F32")}}, "mis-shaped"),
    "numbers that are none": (
        {"tensors": {"blk.1.attn_norm.weight": data(torch.full((48,), torch.nan), "F32")}}, "not finite",
    ),
    "an absurd count": ({"keys": {"llama.block_count": uint32(10**6)}}, "layers"),
    "heads per layer": ({"keys": {"llama.attention.head_count": array(4, [4, 2])}}, "one number was expected"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGED)
def test_a_file_that_is_not_its_model_is_refused_in_a_message(kind, tmp_path):
    changes, words = CHANGED[kind]
    export("llama, linear", tmp_path / "m.gguf")
    rewrite_gguf(tmp_path / "m.gguf", tmp_path / "odd.gguf", **changes)
    with pytest.raises(DataError) as raised:
        load(tmp_path / "odd.gguf")
    assert words in str(raised.value)
    assert "odd.gguf" in str(raised.value)


def test_types_that_are_not_read_are_named(tmp_path):
    export("llama, linear", tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    zeros = {name: data(torch.zeros(tensor.shape), "F32") for name, tensor in file.tensors.items()}
    from llm_quest.hub.gguf import TensorData

    packed = TensorData("IQ4_XS", (2, 256), lambda: iter([bytes(272)]))
    write_gguf(tmp_path / "k.gguf", file.metadata, zeros | {"blk.0.ffn_up.weight": packed})
    with pytest.raises(DataError, match="IQ4_XS; F32, F16, BF16, Q8_0, Q4_0, Q4_1"):
        load(tmp_path / "k.gguf")


def test_llama3s_divisors_are_read_without_our_own_key(tmp_path):
    model, _ = export("llama, llama3", tmp_path / "m.gguf")
    rewrite_gguf(tmp_path / "m.gguf", tmp_path / "bare.gguf", drop=("llm_quest.rope_scaling",))
    bare = our_log_probs(load(tmp_path / "bare.gguf"), IDS)
    assert (bare - our_log_probs(model, IDS)).abs().max() < 1e-5
    lie = {"llm_quest.rope_scaling": string(to_json({**llama3_fields(model), "factor": 2.0}))}
    rewrite_gguf(tmp_path / "m.gguf", tmp_path / "lie.gguf", keys=lie)
    assert torch.equal(our_log_probs(load(tmp_path / "lie.gguf"), IDS), bare)


def llama3_fields(model) -> dict:
    return dict(family_of(model.config).publish(model.config)["rope_scaling"])


def test_keys_that_other_writers_leave_out_have_llama_cpps_defaults(tmp_path):
    config = tiny(
        "llama3.2", num_key_value_heads=4, head_dim=12, rotary=replace(tiny("llama3.2").rotary, dim=12, scaling=None)
    )
    model = randomize_for_judging(quest.build(replace(config, rotary=replace(config.rotary, rope_theta=10_000.0))))
    save_gguf(model, word_tokenizer(VOCAB), tmp_path / "m.gguf")
    optional = [key for key in read_gguf(tmp_path / "m.gguf").metadata if key.removeprefix("llama.") in OPTIONAL]
    assert len(optional) >= 5
    rewrite_gguf(tmp_path / "m.gguf", tmp_path / "bare.gguf", drop=tuple(optional))
    assert torch.equal(our_log_probs(load(tmp_path / "bare.gguf"), IDS), our_log_probs(model, IDS))


def test_inspect_says_what_a_file_holds(tmp_path):
    export("qwen3_5", tmp_path / "m.gguf", quantize="q8_0")
    seen = inspect_folder(tmp_path / "m.gguf")
    assert (seen.family, seen.problems, list(seen.files)) == ("qwen3_next", (), ["m.gguf"])
    assert seen.tokenizer["tokens"] == VOCAB
    assert {tensor.dtype for tensor in seen.tensors} == {"F32", "Q8_0", "F16"}
    assert json.loads(to_json(seen.as_json()))["config"]["model_type"] == "qwen3_5_text"


def test_layouts_name_fields_that_their_configs_have():
    for layout in LAYOUTS:
        makes = [make() for make in GGUF_MODELS.values()]
        configs = [c for c in makes if family_of(c).publish(c)["model_type"] == layout.model_type]
        for config in configs:
            for key in layout.keys.values():
                value = config
                for part in key.field.split("."):
                    value = getattr(value, part)


def test_the_tokenizer_is_in_the_file(tmp_path):
    export("gpt2", tmp_path / "m.gguf")
    assert load_tokenizer(tmp_path / "m.gguf").eos_token_ids == (VOCAB - 1,)
