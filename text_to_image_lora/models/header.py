"""The metadata of a LoRA file for programs that list LoRAs: kohya's `ss_*` and Stability's `modelspec.*` keys.

These are the keys of kohya-ss/sd-scripts (`train_network.py`, `library/sai_model_spec.py`) that readers use: A1111 finds
the base model by ss_v2 and ss_base_model_version, names the file by ss_output_name, and shows the rest.
"""

import base64
import collections
import io
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from .families import KohyaNames
from .kohya import DORA_NETWORK, NETWORK, family_header


# {kohya's key: name of the flag or of the value computed from flags}
SETTINGS = {
    "ss_sd_model_name": "pretrained_model_name_or_path",
    "ss_network_dim": "rank",
    "ss_network_alpha": "lora_alpha",
    "ss_network_dropout": "lora_dropout",
    "ss_learning_rate": "learning_rate",
    "ss_unet_lr": "learning_rate",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_optimizer": "optimizer",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_max_train_steps": "max_train_steps",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_total_batch_size": "effective_batch_size",
    "ss_mixed_precision": "mixed_precision",
    "ss_seed": "seed",
    "ss_caption_dropout_rate": "caption_dropout",
    "ss_caption_tag_dropout_rate": "caption_tag_dropout",
    "ss_shuffle_caption": "shuffle_tags",
    "ss_enable_bucket": "aspect_ratio_buckets",
    "ss_flip_aug": "random_flip",
    "ss_noise_offset": "noise_offset",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_loss_type": "loss_type",
    "ss_prior_loss_weight": "prior_loss_weight",
    "modelspec.trigger_phrase": "trigger_word",
}
THUMBNAIL_SIDE = 256  # pixels


def header_for_readers(
    values: dict[str, str], *, name: str, started_at: float | None, step: int, steps_per_epoch: int, num_pictures: int,
    names: KohyaNames,
) -> dict[str, str]:  # fmt: skip
    """Makes the metadata from `values`: those of flags, and those computed from flags, as strings.

    `name` is that of the file, and `started_at` is when the run first started (seconds since 1970), before interruptions.
    """
    v_prediction = values.get("prediction_type") == "v_prediction"
    # Of several resolutions, readers expect one: that at which sample pictures are drawn.
    side = max(map(int, re.findall(r"\d+", values["resolution"])))
    header = {key: values[flag] for key, flag in SETTINGS.items() if flag in values}
    header |= {
        **family_header(names, v_prediction),
        "ss_output_name": name,
        "ss_steps": str(step),
        "ss_epoch": str(step // steps_per_epoch),
        "ss_num_batches_per_epoch": str(steps_per_epoch),
        "ss_num_train_images": str(num_pictures),
        "ss_resolution": f"({side}, {side})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{names.architectures['v_prediction' if v_prediction else 'epsilon']}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "modelspec.usage_hint": _usage_hint(values, v_prediction),
    }
    if started_at is not None:  # older checkpoints do not record it
        header["ss_training_started_at"] = str(started_at)
        header["modelspec.date"] = datetime.fromtimestamp(started_at, UTC).isoformat()
    if values.get("train_text_encoder") == "True":
        header["ss_text_encoder_lr"] = values.get("text_encoder_lr", values["learning_rate"])
    if "clip_skip" in values:
        header["ss_clip_skip"] = header["modelspec.encoder_layer"] = str(int(values["clip_skip"]) + 1)
    return header | (DORA_NETWORK if values.get("use_dora") == "True" else NETWORK)


def _usage_hint(values, v_prediction):
    hints = [f"Trained on {values['pretrained_model_name_or_path']}."]
    if "trigger_word" in values:
        hints.append(f"Use {values['trigger_word']} in the prompt.")
    if "clip_skip" in values:  # kohya and A1111 count from 1
        hints.append(f"Clip skip {int(values['clip_skip']) + 1} in A1111.")
    if v_prediction:
        hints.append("The base model uses v-prediction.")
    return " ".join(hints)


def tag_frequency(captions: Iterable[str], folder: str) -> str:
    """Returns `ss_tag_frequency`: the counts of the comma-separated tags of captions, the most frequent tag first."""
    tags = collections.Counter(
        tag.strip().lower() for caption in captions for tag in caption.split(",") if tag.strip()
    )
    ordered = dict(sorted(tags.items(), key=lambda row: (-row[1], row[0])))
    return json.dumps({folder: ordered}, ensure_ascii=False)


def thumbnail(path: str | Path) -> str:
    """Returns `modelspec.thumbnail`: a picture as the data URL of a small JPEG without metadata."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
