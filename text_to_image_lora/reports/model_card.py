"""The model card beside the LoRA file, and their upload to the hub."""

import glob
import re
from pathlib import Path
from urllib.parse import quote

import yaml

from ..files import is_hub_id, without_folders, write_whole
from ..models.lora_file import WEIGHTS_NAME


def write_model_card(
    output_dir,
    *,
    base_model: str,
    dataset_names: list[str],
    pictures: list[tuple[str, Path]],
    hyperparameters: dict,
    lora_file: str = WEIGHTS_NAME,
    trigger_word: str | None = None,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Writes README.md, the hub's model card, and returns its path.

    `pictures` are (prompt, path) of sample pictures in `output_dir`. Without a `license`, a base model
    from the hub gets Stable Diffusion's (as in diffusers' examples), and a local one, whose terms are unknown, none.
    """
    on_hub = _is_on_hub(base_model)
    base, *datasets = (
        name if _is_on_hub(name) else Path(name).resolve().name for name in (base_model, *dataset_names)
    )
    pictures = [(prompt, Path(path).relative_to(output_dir).as_posix()) for prompt, path in pictures]
    front = {
        "base_model": base if on_hub else None,
        "datasets": [name for name in dataset_names if _is_on_hub(name)],
        "library_name": "diffusers",
        "license": license or ("creativeml-openrail-m" if on_hub else None),
        "instance_prompt": trigger_word,
        "tags": ["text-to-image", "stable-diffusion", "diffusers", "diffusers-training", "lora", "template:sd-lora"],
        "widget": [{"text": prompt, "output": {"url": picture}} for prompt, picture in pictures],
    }
    front = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False)
    weights = f"{repo_id or '.'!r}, weight_name={lora_file!r}"
    gallery = "\n\n".join(f"![]({quote(picture)})\n{_markdown(prompt)}" for prompt, picture in pictures)
    rows = without_folders({key: value for key, value in hyperparameters.items() if not key.endswith("token")})
    table = "\n".join(f"| {_markdown(key)} | {_markdown(value)} |" for key, value in rows.items())
    pipeline = f"DiffusionPipeline.from_pretrained({base!r})"
    if base.endswith((".safetensors", ".ckpt")):
        pipeline = f"StableDiffusionPipeline.from_single_file({base!r})"
    card = f"""---
{front}---
# LoRA text2image fine-tuning - {_markdown(repo_id or Path(output_dir).resolve().name)}

These are LoRA weights for {_markdown(base)}, fine-tuned on the {_markdown(" and ".join(datasets))} dataset.
{f"The trigger word is {_markdown(trigger_word)}." if trigger_word else ""}

{gallery}

## Use
```python
import torch
from diffusers import {pipeline.partition(".")[0]}

pipe = {pipeline}.to("cuda" if torch.cuda.is_available() else "cpu")
pipe.load_lora_weights({weights})
pipe({(pictures[0][0] if pictures else trigger_word or "a picture")!r}).images[0].save("picture.png")
```

On diffusers before 0.40, `pipe.unet.load_attn_procs({weights})` does it too, for the UNet alone.

## Training
| parameter | value |
|---|---|
{table}
"""
    path = Path(output_dir) / "README.md"
    write_whole(path, card)
    return path


def _is_on_hub(name):
    """Whether this names a model or dataset of somebody's on the hub: `owner/name`, and no such path here."""
    return "/" in name and is_hub_id(name)


def _markdown(value):
    """One line of text that Markdown leaves as it is, in a table cell too."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", " ".join(str(value).split()))


def upload(output_dir, repo_id: str, token: str | None, lora_file: str = WEIGHTS_NAME) -> str:
    """Makes the hub's repository, sends the weights, the card and its pictures, and returns the commit's URL."""
    from huggingface_hub import HfApi, metadata_load

    (Path(output_dir) / lora_file).stat()  # upload_folder says nothing of a pattern that no file has
    card = metadata_load(Path(output_dir) / "README.md") or {}
    names = [lora_file, "README.md", *(row["output"]["url"] for row in card.get("widget", []))]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        commit_message="End of training",
        allow_patterns=[glob.escape(name) for name in names],
    ).commit_url
