"""preprocessor_config.json, and the `image_processor` of processor_config.json: an `ImageProcessor` in transformers'
words.

What a file leaves out is its class's default, so the class is read first: `image_processor_type`, or in older files the
one that belongs to config.json's model_type. A null is no default: it turns a step off. Every key is computed, known to
have no effect here, or refused by its name.

Commonly got wrong: `size` and `crop_size` taken for one number (CLIP resizes the shorter side to the one and cuts the
other out of the middle); a class's own statistics taken for ViT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_quest.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_PIXEL_VALUE,
    PIL_MODES,
    RESAMPLING,
    ImageProcessor,
    ImageSize,
    PixelBudget,
)
from llm_quest.errors import DataError

FILE = "preprocessor_config.json"
COMMON_DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": False,
    "do_pad": False,
    "do_pan_and_scan": False,
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "default_to_square": True,
    "resample": 2,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / MAX_PIXEL_VALUE,
    "do_normalize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
CROPPED_224 = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 3}
CLIP_DEFAULTS = CROPPED_224 | {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_convert_rgb": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
QWEN2_VL_DEFAULTS = {
    "do_center_crop": False, "crop_size": None, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "min_pixels": None, "max_pixels": None, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
"""Its `size` counts pixels, not sides; min_pixels and max_pixels are older words for it."""
PROCESSOR_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {},
    "CLIPImageProcessor": CLIP_DEFAULTS,
    "LlavaImageProcessor": CLIP_DEFAULTS,
    "SiglipImageProcessor": {"resample": 3, "do_convert_rgb": True, "default_to_square": False},
    "Gemma3ImageProcessor": {"do_convert_rgb": True},
    "DeiTImageProcessor": CROPPED_224 | {"size": {"height": 256, "width": 256}},
    "Qwen2VLImageProcessor": CLIP_DEFAULTS | QWEN2_VL_DEFAULTS,
}
"""transformers' classes, and where their defaults differ from ViT's."""
ABSENT_STEPS = {kind: {"do_center_crop": False} for kind in ("Gemma3ImageProcessor", "Qwen2VLImageProcessor")}
"""Steps that a class does not have, whatever its file says."""
PROCESSOR_OF_MODEL = {
    "vit": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "llava": "LlavaImageProcessor",
    "gemma3": "Gemma3ImageProcessor",
    "qwen3_5": "Qwen2VLImageProcessor",
    "qwen3_5_moe": "Qwen2VLImageProcessor",
}
"""The class that a model_type has in files that name none."""
WITHOUT_EFFECT = (
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "device", "return_tensors"),
    *("input_data_format", "disable_grouping", "image_seq_length", "_valid_processor_keys", "pad_size"),
    *("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate"),
)
"""Keys that name classes and containers, or belong to a step that is refused where it is on."""


def parse_preprocessor_config(published: Mapping[str, Any], model_type: str | None = None) -> ImageProcessor:
    """The ImageProcessor of a preprocessor_config.json. model_type: config.json's, for files that name no class.
    DataError names a class, key or value that is not computed."""
    kind = processor_class(published, model_type)
    settings = replace_nulls(COMMON_DEFAULTS | PROCESSOR_DEFAULTS[kind] | dict(published) | ABSENT_STEPS.get(kind, {}))
    refuse_unknown_keys(settings, kind)
    shape = read_shape(settings)
    mean, std = (read_channels(settings, key) for key in ("image_mean", "image_std"))
    if not settings["do_normalize"]:
        mean, std = (0.0,) * len(mean), (1.0,) * len(mean)
    if type(settings["resample"]) is not int or settings["resample"] not in RESAMPLING:
        raise DataError(
            f"{FILE}: resample is {settings['resample']!r}; known: "
            + ", ".join(f"{number} ({name})" for number, name in RESAMPLING.items())
        )
    return ImageProcessor(
        mean=mean,
        std=std,
        resample=RESAMPLING[settings["resample"]],
        crop=settings["do_center_crop"],
        do_resize=settings["do_resize"],
        rescale_factor=read_rescale_factor(settings),
        do_convert_rgb=settings["do_convert_rgb"],
        pad_to_square=settings["do_pad"],
        **shape,
    )


def replace_nulls(settings: Mapping[str, Any]) -> dict[str, Any]:
    """null is false for a step, and for the numbers of a step that is off their default."""
    replaced = {key: False if value is None and key.startswith("do_") else value for key, value in settings.items()}
    unused = {"image_mean": "do_normalize", "image_std": "do_normalize", "size": "do_resize", "resample": "do_resize"}
    for key, step in unused.items():
        if replaced[key] is None and not replaced[step]:
            replaced[key] = COMMON_DEFAULTS[key]
    replaced["default_to_square"] = bool(replaced["default_to_square"])
    return replaced


def processor_class(published: Mapping[str, Any], model_type: str | None) -> str:
    """The class whose defaults hold, without the suffix of its implementation (`Fast`, `Pil`)."""
    name = published.get("image_processor_type") or published.get("feature_extractor_type")
    if name is None:
        return PROCESSOR_OF_MODEL.get(str(model_type), "ViTImageProcessor")
    kind = str(name).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in PROCESSOR_DEFAULTS:
        raise DataError(
            f"{FILE}: image_processor_type is {name!r}, which is not computed here; known: "
            f"{', '.join(PROCESSOR_DEFAULTS)}"
        )
    return kind


def refuse_unknown_keys(settings: Mapping[str, Any], kind: str) -> None:
    """DataError for the first key that might change the images and is not computed."""
    known = {*COMMON_DEFAULTS, *WITHOUT_EFFECT, *PROCESSOR_DEFAULTS[kind]}
    unknown = [key for key, value in settings.items() if key not in known and value not in (None, False)]
    if settings.get("data_format") in ("channels_first", "ChannelDimension.FIRST"):
        unknown.remove("data_format")
    unknown += ["do_pan_and_scan"] if settings["do_pan_and_scan"] else []
    unknown += ["do_pad"] if settings["do_pad"] and kind != "LlavaImageProcessor" else []
    if unknown:
        key = unknown[0]
        raise DataError(
            f"{FILE}: {key} is {settings[key]!r}, which {kind} does not compute here; remove the key if it has no "
            "effect on the images"
        )
    for key, default in COMMON_DEFAULTS.items():
        if isinstance(default, bool) and not isinstance(settings[key], bool):
            raise DataError(f"{FILE}: {key} is {settings[key]!r}; true or false was expected")


def read_shape(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`size` and `resize_size` of the ImageProcessor."""
    if "merge_size" in settings:
        budget = read_pixel_budget(settings)
        return {"size": budget.factor, "resize_size": budget}
    resized = read_size(settings, "size", square=settings["default_to_square"])
    if not settings["do_center_crop"]:
        return {"size": side_if_square(resized), "resize_size": resized if isinstance(resized, int) else None}
    size = side_if_square(read_size(settings, "size" if settings["crop_size"] is None else "crop_size", square=True))
    return {"size": size, "resize_size": None if resized == size else resized}


def read_pixel_budget(settings: Mapping[str, Any]) -> PixelBudget:
    """The shapes of Qwen's images. DataError names a number that is none."""
    size = settings["size"] if isinstance(settings["size"], Mapping) else {}
    numbers = {
        "min_pixels": settings["min_pixels"] or size.get("shortest_edge"),
        "max_pixels": settings["max_pixels"] or size.get("longest_edge"),
        **{key: settings[key] for key in ("patch_size", "merge_size", "temporal_patch_size")},
    }
    for key, value in numbers.items():
        if type(value) is not int or value < 1:
            raise DataError(
                f"{FILE}: {key} is {value!r}; a positive whole number was expected, or size with "
                "shortest_edge and longest_edge in pixels"
            )
    return PixelBudget(**numbers)


def side_if_square(size: ImageSize) -> ImageSize:
    return size[0] if isinstance(size, tuple) and size[0] == size[1] else size


def read_size(settings: Mapping[str, Any], key: str, *, square: bool) -> ImageSize:
    """(height, width), or an integer: the shorter side. square: whether a bare number is a square's side."""
    value = settings[key]
    if type(value) is int:
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    sides = list(value.values()) if isinstance(value, Mapping) else []
    if sides and all(type(side) is int and side > 0 for side in sides):
        if set(value) == {"height", "width"}:
            return value["height"], value["width"]
        if set(value) == {"shortest_edge"}:
            return int(value["shortest_edge"])
    raise DataError(
        f"{FILE}: {key} is {settings[key]!r}; whole numbers of pixels were expected: height and width, or shortest_edge"
    )


def read_channels(settings: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """One number per channel; a bare number is that of all three."""
    value = settings[key]
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * len(PIL_MODES[3])
    if not numbers or not all(type(number) in (int, float) for number in numbers):
        raise DataError(f"{FILE}: {key} is {value!r}; a number for each channel was expected")
    return numbers


def read_rescale_factor(settings: Mapping[str, Any]) -> float:
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    if type(factor) not in (int, float):
        raise DataError(f"{FILE}: rescale_factor is {factor!r}; a number was expected")
    return float(factor)


def build_preprocessor_config(processor: ImageProcessor) -> dict[str, Any]:
    """The contents of preprocessor_config.json, every key written out."""
    height, width = processor.shape
    resized = processor.resize_size
    if isinstance(resized, PixelBudget):
        return build_budget_config(processor, resized)
    if resized is None:
        resized = processor.size if processor.crop else processor.shape
    size = {"shortest_edge": resized} if isinstance(resized, int) else {"height": resized[0], "width": resized[1]}
    kind = "CLIPImageProcessor" if processor.crop else "ViTImageProcessor"
    return {
        "image_processor_type": "LlavaImageProcessor" if processor.pad_to_square else kind,
        **({"do_pad": True} if processor.pad_to_square else {}),
        "size": size,
        **pixel_settings(processor),
        "do_center_crop": processor.crop,
        **({"crop_size": {"height": height, "width": width}} if processor.crop else {}),
    }


def build_budget_config(processor: ImageProcessor, budget: PixelBudget) -> dict[str, Any]:
    """The config of a processor for images whose shape follows from the image (Qwen2VLImageProcessor)."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels},
        "patch_size": budget.patch_size,
        "merge_size": budget.merge_size,
        "temporal_patch_size": budget.temporal_patch_size,
        **pixel_settings(processor),
    }


def pixel_settings(processor: ImageProcessor) -> dict[str, Any]:
    """The keys of what is done to the pixels, whatever their shape."""
    return {
        "do_convert_rgb": processor.do_convert_rgb,
        "do_resize": processor.do_resize,
        "resample": next(number for number, name in RESAMPLING.items() if name == processor.resample),
        "do_rescale": True,
        "rescale_factor": processor.rescale_factor,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }
