"""Writes the model card of a LoRA, and uploads both to the hub."""

import dataclasses
import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml

from ..command_line import plain
from ..errors import TrainingError
from ..files import counted, hide_folders, reason_of, write_whole
from ..hub import create_repository, is_hub_id, upload_folder
from ..models.families import STABLE_DIFFUSION, Family
from ..models.lora_file import WEIGHTS_NAME
from . import stopping


logger = logging.getLogger(__name__)


# What everybody asks for, listed also where it is the default.
ALWAYS_LISTED = {
    "pretrained_model_name_or_path", "rank", "learning_rate", "train_batch_size", "resolution", "trigger_word"
}  # fmt: skip
# Groups and flags that say where and how a run was made and shown, but not how the LoRA came out.
UNLISTED_GROUPS = {"cache", "checkpoints", "samples", "tracking", "sharing"}
UNLISTED = set(
    "config output_dir max_train_time num_cpu_threads cache_dir preview_data dataloader_num_workers".split()  # noqa: SIM905
)


def settings_that_matter(settings: Any) -> dict[str, Any]:
    """Returns the flags that the card lists: those that everybody asks for, and those that differ from their defaults."""
    listed = {}
    for group in dataclasses.fields(settings):
        values = getattr(settings, group.name)
        for field in dataclasses.fields(values):
            value = plain(getattr(values, field.name))
            shared = group.name in UNLISTED_GROUPS or field.name in UNLISTED or not field.metadata["recorded"]
            changed = value != plain(field.default) and not shared
            if value not in (None, []) and (changed or field.name in ALWAYS_LISTED):
                listed[field.name] = value
    return listed


def describe_result(step: int, validation: stopping.Validation | None) -> str:
    """Describes in sentences how long a LoRA was trained, and what that brought on held-out pictures, if there are any."""
    trained = f"Trained for {counted(step, 'step')}."
    if validation is None:
        return f"{trained} No pictures were held out to measure the result."
    count = counted(len(validation.base), "picture")
    if validation.best_step is None:
        return f"{trained} On {count} held out from training, no step was measurably better than the base model."
    gain = 100 * (1 - float(stopping.relative(validation.best, validation.base).mean()))
    loss = "its loss is" if validation.best_step == step else f"the loss was lowest at step {validation.best_step},"
    sentence = f"{trained} On {count} held out from training, {loss} {gain:.1f}% below the base model's."
    if validation.best_drift is None:
        return sentence
    return (
        f"{sentence} For captions without the concept, the mean squared difference from the base model's predictions is "
        f"{100 * validation.best_drift:.1f}% of the base model's loss."
    )


class Sources(NamedTuple):
    """What a LoRA was trained from."""

    base_model: str  # its license is that of its family if it is on the hub, and left out if it is local
    dataset_names: list[str]
    family: Family = STABLE_DIFFUSION


def write_model_card(
    output_dir: str | Path, sources: Sources, *, pictures: list[tuple[str, Path]], hyperparameters: dict,
    result: str = "", kohya_file: str | None = None,
) -> Path:  # fmt: skip
    """Writes README.md, the hub's model card, and returns its path.

    Args:
        pictures: (prompt, path) of sample pictures in `output_dir`.
        hyperparameters: The flags that the card lists, and "hub_model_id", which it uses.
        result: Sentences about the result, as of `describe_result`.
        kohya_file: The name of the file in kohya's format, if there is one.
    """
    base_model, dataset_names, family = sources
    trigger_word, repo_id = hyperparameters.get("trigger_word"), hyperparameters.get("hub_model_id")
    base, *datasets = (
        name if _is_on_hub(name) else Path(name).resolve().name for name in (base_model, *dataset_names)
    )
    samples = [(prompt, Path(path).relative_to(output_dir).as_posix()) for prompt, path in pictures]
    front = _make_front_matter(base if _is_on_hub(base_model) else None, dataset_names, samples, trigger_word, family)
    rows = hide_folders(
        {
            name: value
            for name, value in hyperparameters.items()
            if name != "hub_model_id" and not name.endswith("token")
        }
    )
    table = "\n".join(f"| {_markdown(key)} | {_markdown(value)} |" for key, value in rows.items())
    prompt = samples[0][0] if samples else trigger_word or "a picture"
    sections = [
        f"# LoRA text2image fine-tuning - {_markdown(repo_id or Path(output_dir).resolve().name)}",
        f"These are LoRA weights for {_markdown(base)}, fine-tuned on the {_markdown(' and '.join(datasets))} dataset.",
        "<Gallery />" if samples else "",  # the hub shows the widget's pictures here, each with its prompt
        result,
        f"## Trigger words\nWrite {_markdown(trigger_word)} in the prompt." if trigger_word else "",
        _use_with_diffusers(Path(output_dir), base_model, prompt, hyperparameters, family),
        _use_elsewhere(kohya_file, repo_id, trigger_word) if kohya_file else "",
        "## Training\nThese settings differ from the defaults, or are what is asked for most often:\n\n"
        f"| parameter | value |\n|---|---|\n{table}\n",
    ]
    path = Path(output_dir) / "README.md"
    write_whole(path, f"---\n{front}---\n" + "\n\n".join(filter(None, sections)))
    return path


def _use_with_diffusers(output_dir, base_model, prompt, hyperparameters, family):
    """Makes the section with code that draws a picture. It runs as it stands wherever the base model can be found."""
    repo_id = hyperparameters.get("hub_model_id")
    base, note = base_model, ""
    if not _is_on_hub(base_model):
        base = _path_from(output_dir, base_model) if repo_id is None else None
        if base is not None:
            note = f"Run this in the folder of this card. From there, {_markdown(base)} is the base model's path.\n"
        else:
            base = Path(base_model).resolve().name
            note = f"The base model was a local one: replace {_markdown(base)} by the path of your copy.\n"
    names = {name: hyperparameters[name] for name in ("revision", "variant") if name in hyperparameters}
    options = "".join(f", {name}={value!r}" for name, value in names.items())
    pipeline, load = "DiffusionPipeline", f"from_pretrained({base!r}{options})"
    if base.endswith((".safetensors", ".ckpt")):
        pipeline, load = family.pipeline, f"from_single_file({base!r})"
    weights = f"{repo_id or '.'!r}, weight_name={WEIGHTS_NAME!r}"
    # The precision is set for the whole pipeline, because transformers would load a text encoder in that of its config.
    return f"""## Use with diffusers
{note}```python
import torch
from diffusers import {pipeline}

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = {pipeline}.{load}.to(device, dtype)
pipe.load_lora_weights({weights})
pipe({prompt!r}).images[0].save("picture.png")
```

On diffusers before 0.40, `pipe.unet.load_attn_procs({weights})` also works, for the UNet only."""


def _path_from(output_dir, base_model):
    """Returns the path of a local base model from the output folder; None if it would show folders outside this one."""
    here = os.getcwd()
    inside = all(Path(os.path.abspath(path)).is_relative_to(here) for path in (output_dir, base_model))
    path = os.path.relpath(base_model, output_dir) if inside else ""
    return Path(path).as_posix() if inside and (output_dir / path).exists() else None


def _make_front_matter(base, dataset_names, pictures, trigger_word, family):
    """Makes the YAML that the hub reads; `base` is the base model on the hub, or None."""
    values = {
        "base_model": base,
        "datasets": [name for name in dataset_names if _is_on_hub(name)],
        "library_name": "diffusers",
        "license": family.license if base else None,
        "instance_prompt": trigger_word,
        "tags": ["text-to-image", *family.tags, "diffusers", "diffusers-training", "lora", "template:sd-lora"],
        "widget": [{"text": prompt, "output": {"url": picture}} for prompt, picture in pictures],
    }
    return yaml.safe_dump({key: value for key, value in values.items() if value}, sort_keys=False)


def _use_elsewhere(kohya_file, repo_id, trigger_word):
    """Explains where other programs expect the file in kohya's format."""
    name = _markdown(kohya_file)
    if repo_id and "/" in repo_id:
        name = f"[{name}](https://huggingface.co/{repo_id}/resolve/main/{quote(kohya_file)})"
    prompt = " ".join(f"{trigger_word or 'a picture'} <lora:{Path(kohya_file).stem}:1>".split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", prompt)), default=0))
    return f"""## Use with A1111, Forge and ComfyUI
Download {name}.
- A1111 and Forge: put it in `models/Lora` and write {ticks} {prompt} {ticks} as the prompt.
- ComfyUI: put it in `models/loras` and choose it in a *Load LoRA* node."""


def _is_on_hub(name):
    """Returns whether this names a repository on the hub: `owner/name`, and no local path."""
    return "/" in name and is_hub_id(name)


def _markdown(value):
    """Escapes a value as one line of Markdown that may stand in a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", " ".join(str(value).split()))


def upload(output_dir: str | Path, repo_id: str, token: str | None, files: Sequence[str] = (WEIGHTS_NAME,)) -> str:
    """Creates the hub repository, uploads the weights, the card and its pictures, and returns the URL of the commit."""
    from huggingface_hub import HfApi, metadata_load

    for name in files:
        (Path(output_dir) / name).stat()  # upload_folder would silently ignore a missing file
    card = metadata_load(Path(output_dir) / "README.md") or {}
    names = [*files, "README.md", *(row["output"]["url"] for row in card.get("widget", []))]
    api = HfApi(token=token)
    repo_id = create_repository(api, repo_id)
    return upload_folder(
        api, repo_id, Path(output_dir), commit_message="End of training",
        allow_patterns=[glob.escape(name) for name in names],
    ).commit_url  # fmt: skip


def upload_run(settings: Any, files: list[str]) -> None:
    """Uploads the results of a run for --push_to_hub, and logs the URL; raises `TrainingError` if that fails."""
    output_dir, sharing = settings.run.output_dir, settings.sharing
    try:
        address = upload(output_dir, sharing.repository(output_dir), sharing.hub_token, files)
    except Exception as error:  # whatever failed, the user must know that the weights are written
        raise TrainingError(
            f"The upload failed ({reason_of(error)}). Everything is in {output_dir}: run the same command again to upload it."
        ) from error
    logger.info(f"uploaded: {address}")
