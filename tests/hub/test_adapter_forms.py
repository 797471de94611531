"""Every form of LoRA that PEFT writes: read here it gives PEFT's logits, and saved again PEFT reads it with the same;
or it is refused with the reason."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import llm_quest as quest
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.adapter_config import COMPUTED, HARMLESS
from llm_quest.techniques.adapter_merge import disable_adapter
from llm_quest.techniques.lora import LoRA
from tests.later import Later
from tests.oracles import ATOL, RTOL, randomize_, save_published, tiny_gpt2, tiny_llama, transformers

peft = Later("peft")
pytestmark = pytest.mark.usefixtures("without_model_cards")
BASES = {
    "tied": lambda: tiny_llama(attention_bias=True),
    "untied": lambda: tiny_llama(tie_word_embeddings=False),
    "gpt2": tiny_gpt2,
}
TARGETS = {"tied": ["q_proj", "k_proj", "down_proj"], "untied": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"]}
EMBEDDING = {"tied": "embed_tokens", "untied": "embed_tokens", "gpt2": "wte"}
NEW = {"tied": "k_proj", "untied": "v_proj", "gpt2": "c_fc"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {name: save_published(make(), home / name) for name, make in BASES.items()}


@functools.cache
def read_base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def base_of(folder: Path) -> Any:
    """A copy of the published model: PEFT edits it in place."""
    return copy.deepcopy(read_base(folder))


@functools.cache
def plain_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return quest.load(folder)(tokens())


def tokens() -> Tensor:
    return torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(3))


def perturb_(model: torch.nn.Module) -> None:
    """What learns moves away from its first values (B is zero there)."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def save_peft_adapter(base: Path, folder: Path, name: str, **form: Any) -> Tensor:
    """PEFT's adapter on disk; the logits of what PEFT reads from there."""
    settings = {"r": 3, "lora_alpha": 12, "target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"} | form
    adapted = peft.get_peft_model(base_of(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    perturb_(adapted)
    adapted.save_pretrained(folder)
    return logits_in_peft(base, folder)


def logits_in_peft(base: Path, folder: Path) -> Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base_of(base), folder).eval()(tokens()).logits


FORMS: dict[str, Any] = {
    "rank_pattern": lambda name: {"rank_pattern": {NEW[name]: 5}},
    "alpha_pattern": lambda name: {"alpha_pattern": {NEW[name]: 48}},
    "one layer's rank and alpha": lambda name: {
        "rank_pattern": {f"layers.1.*{NEW[name]}": 2}, "alpha_pattern": {f"0.*{NEW[name]}": 30},
    },
    "patterns, rslora": lambda name: {"use_rslora": True, "rank_pattern": {NEW[name]: 5}},
    "patterns, dora": lambda name: {"use_dora": True, "rank_pattern": {NEW[name]: 5}, "alpha_pattern": {NEW[name]: 3}},
    "pissa": lambda name: {"init_lora_weights": "pissa"},
    "pissa, patterns": lambda name: {"init_lora_weights": "pissa", "rank_pattern": {NEW[name]: 5}},
    "pissa, rslora": lambda name: {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": lambda name: {"init_lora_weights": "olora"},
    "gaussian": lambda name: {"init_lora_weights": "gaussian"},
    "bias": lambda name: {"bias": "all"},
    "embedding whole": lambda name: {"modules_to_save": [EMBEDDING[name]]},
    "head whole": lambda name: {"modules_to_save": ["lm_head"]},
    "both whole": lambda name: {"modules_to_save": [EMBEDDING[name], "lm_head"]},
    "both whole and tied": lambda name: {"modules_to_save": [EMBEDDING[name]], "ensure_weight_tying": True},
    "a norm whole": lambda name: {"modules_to_save": ["ln_f" if name == "gpt2" else "model.norm"]},
    "embedding": lambda name: {"target_modules": [*TARGETS[name], EMBEDDING[name]]},
    "head": lambda name: {"target_modules": [*TARGETS[name], "lm_head"]},
    "embedding, tied": lambda name: {
        "target_modules": [*TARGETS[name], EMBEDDING[name]], "ensure_weight_tying": True,
    },
    "embedding and head": lambda name: {"target_modules": [*TARGETS[name], EMBEDDING[name], "lm_head"]},
    "head, dora": lambda name: {"target_modules": [*TARGETS[name], "lm_head"], "use_dora": True},
    "rows of tokens": lambda name: {"trainable_token_indices": [5, 90, 2]},
    "rows of tokens by module": lambda name: {"trainable_token_indices": {EMBEDDING[name]: [7]}},
}  # fmt: skip
IMPOSSIBLE = {
    ("untied", "both whole and tied"): "nothing is tied",
    ("untied", "embedding, tied"): "nothing is tied",
    ("gpt2", "olora"): "PEFT's form of a matrix that is stored the other way round does not fit itself",
}


@pytest.mark.parametrize(("name", "form"), [pair for pair in itertools.product(BASES, FORMS) if pair not in IMPOSSIBLE])
def test_pefts_adapter_gives_its_logits_here_and_again_in_peft(bases, tmp_path, name: str, form: str):
    expected = save_peft_adapter(bases[name], tmp_path / "a", name, **FORMS[form](name))
    ours = quest.load(tmp_path / "a")
    assert (expected - plain_logits(bases[name])).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), expected, atol=ATOL, rtol=RTOL)
    quest.save_adapter(ours, tmp_path / "again", base=str(bases[name]))
    torch.testing.assert_close(logits_in_peft(bases[name], tmp_path / "again"), expected, atol=ATOL, rtol=RTOL)
    with torch.no_grad():
        torch.testing.assert_close(quest.load(tmp_path / "again")(tokens()), expected, atol=ATOL, rtol=RTOL)


def test_a_reward_models_adapter_brings_its_score_head(bases, tmp_path):
    make = transformers.AutoModelForSequenceClassification.from_pretrained
    theirs = make(bases["untied"], num_labels=1, pad_token_id=0)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    perturb_(adapted)
    adapted.save_pretrained(tmp_path / "a")
    rows = tokens().clamp(min=1)
    ours = quest.load(tmp_path / "a")
    with torch.no_grad():
        expected = adapted.eval()(rows).logits
        torch.testing.assert_close(ours(rows)[:, -1], expected, atol=ATOL, rtol=RTOL)
        quest.save_adapter(ours, tmp_path / "again", base=str(bases["untied"]))
        again = peft.PeftModel.from_pretrained(make(bases["untied"], num_labels=1, pad_token_id=0), tmp_path / "again")
        torch.testing.assert_close(again.eval()(rows).logits, expected, atol=ATOL, rtol=RTOL)


def test_what_learns_whole_is_trained_saved_and_no_reference(bases, tmp_path):
    ours = LoRA(rank=2, targets=("q",), modules_to_save=("embed.token", "norm"))(quest.load(bases["untied"]))
    ours(tokens()).sum().backward()
    assert ours.embed.token.weight.grad is not None
    assert ours.norm.weight.grad is not None
    assert ours.head.weight.grad is None
    perturb_(ours)
    with pytest.raises(UsageError, match=r"embed\.token, norm learned whole"), disable_adapter(ours):
        pass
    quest.save_adapter(ours, tmp_path / "a", base=str(bases["untied"]))
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["modules_to_save"] == [
        "embed_tokens", "model.norm",
    ]  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(
            logits_in_peft(bases["untied"], tmp_path / "a"), ours(tokens()), atol=ATOL, rtol=RTOL
        )
    with pytest.raises(UsageError, match=r"modules_to_save names lm_head.*may name embed\.token, or head"):
        LoRA(modules_to_save=("lm_head",))(quest.load(bases["untied"]))


def test_several_adapters_in_one_folder_are_loaded_by_name(bases, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    both = peft.get_peft_model(base_of(bases["untied"]), config, adapter_name="first")
    both.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["v_proj"]))
    for name in ("first", "second"):
        both.set_adapter(name)
        perturb_(both)
    both.save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match=r"holds several by name, first, second: give one, such as .*a/first"):
        quest.load(tmp_path / "a")
    for name in ("first", "second"):
        both.set_adapter(name)
        with torch.no_grad():
            expected = both.eval()(tokens()).logits
            torch.testing.assert_close(quest.load(tmp_path / "a" / name)(tokens()), expected, atol=ATOL, rtol=RTOL)
            named = quest.load_adapter(quest.load(bases["untied"]), tmp_path / "a", adapter_name=name)
            torch.testing.assert_close(named(tokens()), expected, atol=ATOL, rtol=RTOL)
    with pytest.raises(DataError, match=r"holds no adapter.*first, second"):
        quest.load_adapter(quest.load(bases["untied"]), tmp_path / "a")


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq", "corda", "lora_ga", "something new"])
def test_an_adapter_whose_base_was_changed_beyond_recovery_is_refused(bases, tmp_path, start: str):
    save_peft_adapter(bases["untied"], tmp_path / "a", "untied")
    rewrite(tmp_path / "a", init_lora_weights=start)
    with pytest.raises(DataError, match=rf"init_lora_weights is '{start}', which changed the base model too"):
        quest.load(tmp_path / "a")


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_setting_of_pefts_config_is_computed_or_harmless_or_refused(bases, tmp_path):
    """An allow-list: a setting that no table names stops loading, whatever it is called."""
    save_peft_adapter(bases["untied"], tmp_path / "a", "untied")
    quest.load(tmp_path / "a")
    known = COMPUTED | HARMLESS
    others = {name for name in peft.LoraConfig().to_dict() if name not in known}
    assert others >= {"lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora"}
    for name in [*sorted(others), "use_new_thing"]:
        rewrite(tmp_path / "a", **{name: [1]})
        with pytest.raises(DataError, match=rf"{name} \(\[1\]\) is not computed here: merge the adapter"):
            quest.load(tmp_path / "a")
        rewrite(tmp_path / "a", **{name: None})
        quest.load(tmp_path / "a")


def test_an_adapter_for_names_without_prefix_or_within_a_model_of_several_parts_is_read(bases, tmp_path):
    expected = save_peft_adapter(bases["untied"], tmp_path / "a", "untied")
    file = tmp_path / "a/adapter_model.safetensors"
    held = safetensors.torch.load_file(file)
    for inside in ("", "model.language_model.", "language_model.model."):
        safetensors.torch.save_file(
            {n.replace("model.model.layers", f"model.{inside}layers"): t for n, t in held.items()}, file
        )
        with torch.no_grad():
            torch.testing.assert_close(quest.load(tmp_path / "a")(tokens()), expected, atol=ATOL, rtol=RTOL)


def test_an_embedding_of_another_size_says_what_to_do(bases, tmp_path):
    larger = base_of(bases["tied"])
    larger.resize_token_embeddings(99)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    larger.tie_weights()
    peft.get_peft_model(randomize_(larger), config).save_pretrained(tmp_path / "a")
    rewrite(tmp_path / "a", base_model_name_or_path=str(bases["tied"]))
    with pytest.raises(DataError, match=r"\.weight is \(99, 64\), .* \(97, 64\): add the tokens"):
        quest.load(tmp_path / "a")
