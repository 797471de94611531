"""The options of `quest generate` and `quest chat` about sampling, penalties and the form of prompts.

An option that the command line leaves out comes from generation_config.json (temperature, top_k, top_p, min_p,
repetition_penalty, do_sample), and otherwise from the command's own defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from llm_quest.errors import UsageError

if TYPE_CHECKING:
    from llm_quest.contracts import LogFn
    from llm_quest.data.tokenizer import Tokenizer
    from llm_quest.generation.beam_search import BeamSearchParams
    from llm_quest.generation.sampling import SamplingParams
    from llm_quest.generation.stopping import StoppingCriteria
    from llm_quest.models.decoder import Decoder, GenerationConfig

GENERATE_DEFAULTS: Mapping[str, float] = {"temperature": 0.8}
CHAT_DEFAULTS: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.95}
"""Defaults of the commands for a model whose generation_config.json has none."""
ADVISED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationOptions:
    """Options of `quest generate` and `quest chat`. tokens: the maximum of new tokens. temperature ...
    repetition_penalty: None until `with_advice` has decided. slide: go on beyond the context by dropping the oldest
    tokens. compile: use compiled forward passes. chat: the prompt is a user's message in the folder's chat template,
    after a system message. special_tokens: control tokens may be written out in a prompt."""

    tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: tuple[str, ...]
    slide: bool
    seed: int
    compile: bool = False
    min_new_tokens: int = 0
    no_repeat_ngram_size: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    chat: bool = False
    system: str | None = None
    special_tokens: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def with_advice(
        self, advice: GenerationConfig | None, defaults: Mapping[str, float], log: LogFn
    ) -> GenerationOptions:
        """The same options with every choice made; logs those that generation_config.json advises."""
        advised = read_advice(advice)
        if self.num_beams > 1:
            advised = {key: value for key, value in advised.items() if key == "repetition_penalty"}
            defaults = {"temperature": 0.0}
        left = {key: value for key, value in advised.items() if getattr(self, key) is None}
        if left:
            log(f"generation_config.json advises {', '.join(f'{key} {value:g}' for key, value in left.items())}")
        chosen: dict[str, Any] = left or {
            key: value for key, value in defaults.items() if getattr(self, key) is None and not advised
        }
        decided = replace(self, **chosen)
        if decided.temperature is None:
            decided = replace(decided, temperature=defaults["temperature"])
        return replace(decided, repetition_penalty=decided.repetition_penalty or 1.0)

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise UsageError("--system is part of a chat template: give --chat too, or leave it out")
        if self.chat_template_kwargs and not self.chat:
            raise UsageError("--chat-template-kwargs is read by a chat template: give --chat too, or leave it out")
        if self.length_penalty != 1 and self.num_beams == 1:
            raise UsageError("--length-penalty belongs to beam search: give --beams too, or leave it out")
        self.sampling  # noqa: B018  (mistakes are reported before a model is loaded)

    @property
    def sampling(self) -> SamplingParams:
        """UsageError for a choice out of its range."""
        from llm_quest.generation.sampling import SamplingParams

        given = {name: value for name in ADVISED if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            logit_bias=self.logit_bias,
        )

    @property
    def beams(self) -> BeamSearchParams | None:
        """Beam search, where there is more than one beam."""
        from llm_quest.generation.beam_search import BeamSearchParams

        if self.num_beams == 1:
            return None
        return BeamSearchParams(num_beams=self.num_beams, length_penalty=self.length_penalty)

    def stopping_criteria(self, model: Decoder, tokenizer: Tokenizer) -> StoppingCriteria:
        from llm_quest.generation.stopping import StoppingCriteria, end_token_ids

        beyond: Literal["stop", "slide"] = "slide" if self.slide else "stop"
        return StoppingCriteria(
            max_new_tokens=self.tokens,
            eos_token_ids=end_token_ids(model, tokenizer),
            stop=self.stop,
            tokenizer=tokenizer,
            on_full_context=beyond,
            min_new_tokens=self.min_new_tokens,
        )

    def encode_prompts(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of prompts: as text, or as messages in the chat template. UsageError for a folder without one."""
        if not self.chat:
            encoded = tokenizer.encode_batch(prompts, allow_special_tokens=self.special_tokens)
            return [ids or [tokenizer.start_token_id] for ids in encoded]
        from llm_quest.data.chat import ChatTemplate

        if not tokenizer.chat_template:
            raise UsageError(
                "--chat: this folder has no chat template; leave --chat out to continue the prompt as text"
            )
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        chat = ChatTemplate(tokenizer, chat_template_kwargs=self.chat_template_kwargs)
        return chat.encode_prompts([[*before, {"role": "user", "content": prompt}] for prompt in prompts])

    def as_settings(self) -> dict[str, Any]:
        """The settings that the text depends on, to be recorded; options at their default are left out."""
        defaults = {one.name: one.default for one in fields(self)} | {"chat_template_kwargs": {}}
        return {key: value for key, value in asdict(self).items() if key != "compile" and value != defaults[key]}


def read_advice(advice: GenerationConfig | None) -> dict[str, Any]:
    """The sampling that generation_config.json advises; empty where it has none. do_sample false is temperature 0."""
    if advice is None:
        return {}
    advised = {key: value for key in ADVISED if (value := getattr(advice, key)) is not None}
    if advice.do_sample is False:
        return {key: value for key, value in advised.items() if key == "repetition_penalty"} | {"temperature": 0.0}
    if not advised and advice.do_sample is None:
        return {}
    advised = {key: value for key, value in advised.items() if not (key == "top_k" and value == 0)}  # 0: no limit
    return {"temperature": 1.0} | advised


def parse_template_kwargs(text: str | None) -> dict[str, Any]:
    """Arguments of a chat template, as the command line gives them. UsageError for anything but a mapping of names."""
    if text is None:
        return {}
    from llm_quest.data.template_program import find_reserved_argument
    from llm_quest.recipes.yaml_io import read_yaml

    settings = read_yaml(text, "--chat-template-kwargs")
    given = settings.tree
    if settings.problems or not given:
        raise UsageError(
            f"--chat-template-kwargs {text!r}: give names and values, such as '{{enable_thinking: false}}'"
        )
    if name := find_reserved_argument(given):
        raise UsageError(f"--chat-template-kwargs: {name!r} is given to every chat template; leave it out")
    return given


def parse_logit_bias(given: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """ID=BIAS each. UsageError for another form."""
    biases = []
    for one in given:
        token, _, value = one.partition("=")
        try:
            biases.append((int(token), float(value)))
        except ValueError:
            raise UsageError(f"--logit-bias {one!r}: give a token id and a number, such as 151645=-100") from None
    return tuple(biases)
