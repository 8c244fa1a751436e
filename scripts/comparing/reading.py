"""Reads the results of an item as {where: value}: tensors, text as `Lines`, and everything else as plain values.

Values that depend on the time or the machine are left out here; `texts` does the same for text.
"""

import json
import re

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from . import texts
from .texts import Lines
from .wandb_record import history_of, read_wandb


# Keys that are left out: speed and memory, the start time of a run and the random id of its tracker, the system and its
# Python, and the commit, which is unknown in a checkout that was unpacked from an archive.
OF_METRICS = r"images_per_second|peak_memory_gib"
OF_HEADERS = r"ss_training_started_at|modelspec\.date"
OF_STATES = r"state\.(started_at|tracker_run_id)"
OF_ABOUT = r"machine\.(system|python)|versions\.commit"
# The versions and the CPU that infer.py writes into each picture, because its last bits depend on them.
OF_PICTURES = r"diffusers_version|repeat\.machine\..*"
# The clock and the file names of W&B, and what is left out of about.json.
OF_TRACKERS = r"(step \d+ )?(_\w+|(.+\.)?(sha256|size|path|\w*artifact_path|filenames(\[\d+\])?))"
OF_TRACKERS += rf"|step \d+ ({OF_METRICS})|config (machine/(system|python)|versions/commit|_wandb\..*)"
PROSE = r".*(notes|reason)(\[\d+\])?|modelspec\.usage_hint"  # values that are sentences, which --words accepts


def read_item(item, folder, made):
    """Returns {where: value} of a folder of `items.make`: exit codes and files first, the output of the commands last."""
    names, found, streams = texts.Names(folder, made["checkout"]), {}, {}
    labels = [label for label in item.lines if not item.begun_before or label != next(iter(item.lines))]
    for label in labels:
        found[f"exit code of {label}"] = made["codes"][label]
        for stream in ("stdout", "stderr"):
            text = (folder / f"{label}.{stream}").read_text(errors="replace")
            if item.name == "help" and stream == "stdout":
                streams |= {f"{label}: {key}": value for key, value in texts.help_entries(text).items()}
            else:
                streams[f"{stream} of {label}"] = texts.output(text, names)
    out = folder / "out"
    paths = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    # The metrics first, because they show at which step a difference begins.
    files = sorted(filter(is_compared, paths), key=lambda path: (path.suffix != ".jsonl", path))
    found["files"] = [names(path.as_posix()) for path in files]
    for path in files:
        if "cache" not in path.parts:  # the name of a cached file is a hash of its content
            found |= {f"{path}: {key}": value for key, value in read_file(out / path, names).items()}
    for run in out.rglob("offline-run-*"):
        found |= {f"wandb: {key}": value for key, value in read_tracker(run, names).items()}
    return found | streams


def is_compared(path):
    """Whether the file with this relative path must exist on both sides."""
    if "wandb" in path.parts:  # folders named after the time, see `read_tracker`
        return False
    return "cache" not in path.parts or bool({"latents", "prompts"} & {*path.parts})


def read_file(path, names):
    """Returns {key: value} of a file."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors, header = {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}
        return tensors | {f"header {k}": v for k, v in plain(header, names, OF_HEADERS).items()}
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True), names)
    if path.suffix == ".png":
        with Image.open(path) as image:
            chunks = {k: json.loads(v) if k == "repeat" else v for k, v in image.info.items()}
            return {"pixels": torch.from_numpy(np.array(image)), **plain(chunks, names, OF_PICTURES)}
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".jsonl":
        rows = {f"row {i}": json.loads(line) for i, line in enumerate(text.splitlines())}
        return plain(rows, names, rf".*\.({OF_METRICS})")
    if path.name == "manifest.json":  # hashes of files that are compared themselves
        return {"names": sorted(json.loads(text))}
    if path.name == "about.json":
        about = json.loads(text)
        about["command"] = texts.sorted_command(about["command"])
        return plain(about, names, OF_ABOUT)
    if path.suffix in (".json", ".yaml"):
        return plain(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text), names, OF_STATES)
    if path.name == "README.md":
        return {"text": texts.model_card(names(text))}
    if path.suffix == ".html":
        about = json.loads((path.parent / "about.json").read_text())
        own = {about["machine"]["system"], about["machine"]["python"], about["versions"].get("commit"), "commit"}
        return {"text": Lines(line for line in texts.page(names(text)) if line not in own)}
    return {"text": Lines(names(text).splitlines())}


def read_tracker(run, names):
    """Returns {key: value} of an offline run of W&B: its configuration, and the history and the summary of its metrics."""
    records, found = read_wandb(run), {}
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "metric":
            found[f"metric {record.metric.name or record.metric.glob_name}"] = str(record.metric)
        if kind in ("config", "run"):
            for item in (record.config if kind == "config" else record.run.config).update:
                found[f"config {item.key or '.'.join(item.nested_key)}"] = json.loads(item.value_json)
    if "config command" in found:
        found["config command"] = texts.sorted_command(found["config command"])
    for step, row in history_of(records).items():
        found |= {f"step {step} {name}": value for name, value in row.items()}
    return plain(found, names, OF_TRACKERS)


def plain(value, names, left_out=r"(?!)"):
    """Flattens nested dicts and lists to {key: leaf}, without the keys that match `left_out`."""
    found = {}

    def walk(key, value):
        if re.fullmatch(left_out, key):
            return
        if isinstance(value, dict) and value:
            for name, each in value.items():
                walk(f"{key}.{name}" if key else str(name), each)
        elif isinstance(value, (list, tuple)) and value:
            for i, each in enumerate(value):
                walk(f"{key}[{i}]", each)
        elif isinstance(value, str):
            text = names(value)
            found[key] = Lines(text.splitlines()) if re.fullmatch(PROSE, key) else text
        else:
            found[key] = value

    walk("", value)
    return found
