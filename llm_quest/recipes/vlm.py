"""`quest train vlm`: images with words -> an image encoder, an adapter and a Llama -> captions and answers.

Held-out images (of scenes: combinations never trained on) are evaluated one question at a time; an answer is right if
every word is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llm_quest.contracts import LogFn
from llm_quest.data.document import DropReport
from llm_quest.data.image_chat import ImageChat
from llm_quest.data.image_text import (
    CaptionDataset,
    ImageTextCollator,
    ImageTextDataset,
    ImageTextRows,
    SceneDataset,
    read_caption_rows,
)
from llm_quest.data.images import CLIP_STATISTICS, ImageProcessor, PixelBudget
from llm_quest.data.synthetic_shapes import SCENE_STATISTICS
from llm_quest.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import UsageError
from llm_quest.eval.images import ImageQuestionEvaluator
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import find_preprocess, load_tokenizer
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import clip, llama
from llm_quest.models.build import build, preset
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.llava import Config
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.objectives.next_token import CaptioningLoss
from llm_quest.recipes.assembly import (
    apply_techniques,
    count_epochs,
    load_config_rows,
    log_remarks,
    make_sharded_loader,
    source_name,
)
from llm_quest.recipes.auto import resolve_auto
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.engine import build_lr_schedule
from llm_quest.recipes.model_config import make_generation_config
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.vit import fsdp_blocks
from llm_quest.recipes.vlm_config import PART_MODULES, VlmConfig
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.train.optimizers import scale_schedule_after
from llm_quest.train.rng_state import derive_seed

IMAGE_TOKEN = "<image>"
ADAMW_PARAMETERS = ("tower.embed.positions", "decoder.embed.", "decoder.head.")


def build_vlm(config: VlmConfig, context: Context) -> Job:
    """Images with text, tokenizer, model, captioning loss."""
    parallel, log = context.parallel, context.log
    config = resolve_auto(config, context)
    preprocess = load_or_make_preprocess(config, log)
    drop_report = DropReport()
    dataset = load_image_text(config, preprocess, drop_report)
    log_remarks(drop_report, log)
    tokenizer = build_vlm_tokenizer(config, dataset)
    model = init_vlm(config, tokenizer, preprocess).train_only([PART_MODULES[part] for part in config.trainable])
    model.generation_config = make_generation_config(tokenizer)
    numbers = model.config
    chat = ImageChat(tokenizer, numbers)

    def prefix_of(height: int, width: int) -> list[int]:
        return chat.encode_images([numbers.num_image_tokens(height, width)])

    image_ids = prefix_of(*preprocess.shape)
    several = isinstance(preprocess.resize_size, PixelBudget)
    log(
        f"an image is {'at least ' if several else ''}{len(image_ids) - 1} of the {config.sequence_length} tokens of a "
        f"row; {', '.join(config.trainable)} trained"
    )
    writer = ImageTextCollator(tokenizer, tuple(image_ids), config.sequence_length, prefix_of if several else None)
    rows = ImageTextRows(
        dataset,
        writer,
        preprocess,
        max_turns=config.data.max_questions_per_row,
        caption_first_rows=config.caption_first_steps * config.batch_size,
    )
    config = count_epochs(config, context.settings, dataset.num_train_examples, log)
    loader = make_sharded_loader(config, rows, parallel)
    samples = context.samples_dir
    evaluator = ImageQuestionEvaluator(dataset, writer, preprocess, config.eval_images, config.eval_steps, samples)
    callbacks = apply_techniques(config.all_techniques, model, log)
    return Job(
        config,
        CaptioningLoss(model),
        loader,
        [] if dataset.num_eval_examples == 0 else [evaluator],
        {"sights": dataset.hash, "tokenizer": tokenizer.hash},
        {"corpus": {"name": source_name(config.data)}, **drop_report.row_facts()},
        tokenizer,
        preprocess,
        callbacks=callbacks,
        watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
        lr_schedule=scale_schedule_after(
            build_lr_schedule(config), config.caption_first_steps, config.question_lr_scale
        ),
        blocks=fsdp_blocks(model),
        adamw_parameters=ADAMW_PARAMETERS,
    )


def load_or_make_preprocess(config: VlmConfig, log: LogFn) -> ImageProcessor:
    """Make the image processor: that of the loaded model or tower; for scenes one without zeros; else scaling to
    -1..1."""
    where = config.model.load or config.vision_tower.load
    if where is not None:
        processor = find_preprocess(where) or default_preprocess(load_vision_config(where), where, log)
        if isinstance(processor.resize_size, PixelBudget):
            if config.data.is_synthetic:
                raise UsageError(f"{where} reads images of several sizes: give images of your own, data.source=FILE")
        elif not isinstance(processor.size, int) or (processor.resize_size is not None and not processor.crop):
            raise UsageError(f"{where} makes images that are not square; quest train vlm trains on squares")
        return processor
    whole = config.model.preset
    size = config.data.image_size if whole is None else preset(whole).config.vision_config.image_size
    statistics: dict[str, Any] = SCENE_STATISTICS if config.data.is_synthetic else {}
    return ImageProcessor(size, **statistics)


def default_preprocess(vision: Any, name: str, log: LogFn) -> ImageProcessor:
    """The image processor of an encoder without a preprocessor file: that of its class."""
    is_clip = isinstance(vision, clip.Config)
    log(f"{name} does not say how its images are made: as {'CLIP' if is_clip else 'ViT'} makes them")
    return ImageProcessor(vision.image_size, **(CLIP_STATISTICS if is_clip else {}))


def load_vision_config(name_or_path: str) -> Any:
    """The vision config of a model without a preprocessor file."""
    config = load(name_or_path, device="meta", vision=True).config
    return getattr(config, "vision_config", config)


def load_image_text(config: VlmConfig, preprocess: ImageProcessor, drop_report: DropReport) -> ImageTextDataset:
    data = config.data
    if data.is_synthetic:
        return SceneDataset(preprocess.shape[0])
    rows = load_config_rows(data, read_caption_rows, drop_report)
    held_out = [] if data.validation is None else load_config_rows(data.of_validation, read_caption_rows, drop_report)
    return CaptionDataset(rows, preprocess, data.held_out, source_name(data), held_out, data.eval_part)


def build_vlm_tokenizer(config: VlmConfig, dataset: ImageTextDataset) -> Tokenizer:
    """The loaded model's tokenizer, or one trained on the training text, with a placeholder among its control
    tokens."""
    where = config.model.load or config.language_model.load
    if where is None:
        return train_bpe(dataset.tokenizer_texts(), config.language_model.vocab_size, (*SPECIAL_TOKENS, IMAGE_TOKEN))
    tokenizer = load_tokenizer(where)
    if config.model.load is None and IMAGE_TOKEN not in tokenizer.special_tokens:
        tokenizer.backend_tokenizer.add_special_tokens([IMAGE_TOKEN])
        tokenizer = Tokenizer(
            tokenizer.backend_tokenizer,
            eos_tokens=tokenizer.special_token_names["eos_token"] or (),
            bos_token=tokenizer.special_token_names["bos_token"],  # type: ignore[arg-type]
            pad_token=tokenizer.special_token_names["pad_token"],  # type: ignore[arg-type]
            chat_template=tokenizer.chat_template,
        )
    return tokenizer


def init_vlm(config: VlmConfig, tokenizer: Tokenizer, preprocess: ImageProcessor) -> VisionLanguageModel:
    """Load a whole model, or assemble one from parts that are loaded or initialized."""
    if config.model.load is not None:
        loaded: Any = load(config.model.load, dtype="float32", aligned=True, vision=True)
        if not isinstance(loaded, VisionLanguageModel):
            raise UsageError(
                f"model.load={config.model.load} is no vision-language model; set vision_tower.load or "
                "language_model.load to start from a part"
            )
        return loaded
    if config.model.preset is not None:
        return build(fit_preset(config, tokenizer), seed=derive_seed(config.seed, "init"))  # type: ignore[return-value]
    tower = load(config.vision_tower.load, dtype="float32", aligned=True) if config.vision_tower.load else None
    decoder = load(config.language_model.load, dtype="float32", aligned=True) if config.language_model.load else None
    vision = tower.config if tower is not None else make_tower_config(config, preprocess)
    text = decoder.config if decoder is not None else make_decoder_config(config, tokenizer)
    if tokenizer.vocab_size > text.vocab_size:
        text = replace(text, vocab_size=tokenizer.vocab_size)
    depth = config.vision_tower.feature_layer or vision.num_hidden_layers
    numbers = Config(
        vision,
        text,
        tokenizer.token_to_id(IMAGE_TOKEN),
        depth,
        config.projector == "mlp",
        keep_cls_token=config.vision_tower.keep_class_token,
    )
    seed = derive_seed(config.seed, "init")
    model: Any = build(numbers, seed=seed)
    if tower is not None:
        copy_weights_(model.tower, tower)
    else:
        init_position_embeddings_(model.tower, seed)
    if decoder is not None:
        copy_weights_(model.decoder, decoder)
    return model


def fit_preset(config: VlmConfig, tokenizer: Tokenizer) -> Config:
    """A preset's config with the vocabulary of this tokenizer."""
    numbers: Config = preset(str(config.model.preset)).config
    text = replace(numbers.text_config, vocab_size=tokenizer.vocab_size)
    return replace(numbers, text_config=text, image_token_id=tokenizer.token_to_id(IMAGE_TOKEN))


def make_tower_config(config: VlmConfig, preprocess: ImageProcessor) -> clip.Config:
    part, size = config.vision_tower, preprocess.shape[0]
    return clip.Config(
        size,
        part.patch_size,
        len(preprocess.mean),
        part.hidden_size,
        part.num_hidden_layers,
        part.num_attention_heads,
        part.intermediate_size,
    )


def make_decoder_config(config: VlmConfig, tokenizer: Tokenizer) -> llama.Config:
    part = config.language_model
    head = part.hidden_size // part.num_attention_heads
    rotary = RotaryEmbedding(head, 10_000.0)
    return llama.Config(
        tokenizer.vocab_size,
        part.hidden_size,
        part.num_hidden_layers,
        part.num_attention_heads,
        part.num_attention_heads,
        head,
        part.intermediate_size,
        config.sequence_length,
        rotary,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def init_position_embeddings_(tower: ImageEncoder, seed: int) -> None:
    """Initialize positions by N(0,1), the size of a normalized patch.

    Commonly got wrong: with CLIP's std of 0.02, chosen for millions of steps, a tower from scratch does not locate
    objects for thousands of steps."""
    nn.init.normal_(tower.embed.positions, generator=torch.Generator().manual_seed(seed + 1))  # type: ignore[arg-type]


@torch.no_grad()
def copy_weights_(part: nn.Module, trained: nn.Module) -> None:
    """Copy a trained model's weights into a part; new rows of a larger vocabulary stay, a classifier's head is not
    copied."""
    theirs = dict(trained.named_parameters())
    for name, parameter in part.named_parameters():
        rows = theirs[name].shape[0] if parameter.dim() else 1
        (parameter[:rows] if parameter.dim() else parameter).copy_(theirs[name])


RECIPE = Recipe("vlm", VlmConfig, build_vlm)
