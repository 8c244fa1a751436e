"""Checkpoints: the state of training on disk, written whole or not at all, and read without unpickling code."""

import contextlib
import io
import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..command_line import between
from ..errors import InputError
from ..files import check_regular, reason_of, remove_folder, written_whole
from ..small_files import Values, read_json
from .likeness import check_adapter, check_like, check_optimizer_state, check_schedule
from .manifest import MANIFEST, find_damage, write_manifest


logger = logging.getLogger(__name__)
NAME = re.compile(r"checkpoint-(\d+)")
MEANINGS = {"dataset": "dataset (the pictures, captions and repeats)"}  # of fingerprints, in messages
MARKER_FILES = ("state.json", MANIFEST)  # a folder with one of these is a checkpoint


# {field of `TrainState`: its kind and, if it may be missing, its default}, see `Values.want`
STATE_KINDS: dict[str, tuple] = {
    "seed": (between(0, 2**63 - 1, int),),
    "global_step": (between(0, 2**53, int),),
    "started_at": (between(0, 2**36), None),
    "tracker_run_id": (str, None),
    "validation": (dict, None),
    "batch_size": (between(1, 2**31, int), None),
    "due": (list, []),
}


@dataclass
class TrainState:
    """The progress of a run. `global_step` and `seed` determine the epoch, the order of samples and all random draws."""

    seed: int
    global_step: int = 0
    started_at: int | None = None  # seconds since 1970
    tracker_run_id: str | None = None
    validation: dict | None = None  # the state of the validation
    batch_size: int | None = None  # what --train_batch_size auto found
    due: list[str] = field(default_factory=list)  # what the stopped run had not yet done after this step


def list_checkpoints(output_dir: Path | str) -> list[Path]:
    """Returns the `checkpoint-N` folders, oldest first, whether or not they are damaged."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in found if _is_checkpoint(path)), key=parse_step)


def _is_checkpoint(path):
    return any((path / name).is_file() for name in MARKER_FILES)


def parse_step(path: Path) -> int:
    """Returns the step in the name of a `checkpoint-N` folder."""
    return int(path.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: Path | str, wanted: str) -> Path | None:
    """Returns the folder that `--resume_from_checkpoint` selects, or None to begin a new run.

    `latest` logs and skips damaged checkpoints. A damaged checkpoint that was selected by name raises `InputError`.
    """
    if wanted == "none":
        return None
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)
        newest = find_newest_intact(checkpoints)
        if checkpoints and newest is None:
            logger.info(
                f"{output_dir}: none of its checkpoints is intact, so training starts over from the first step"
            )
        return newest
    for path in (Path(wanted), Path(output_dir) / Path(wanted).name):
        if _is_checkpoint(path):
            if (damage := find_damage(path)) is not None:
                raise InputError(f"{path}: this checkpoint is damaged ({damage}). Resume from another one.")
            return path
    names = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
    raise InputError(
        f"{wanted}: this is not a checkpoint (--resume_from_checkpoint). In {output_dir} there are: {names}."
    )


def find_newest_intact(checkpoints: list[Path]) -> Path | None:
    """Returns the last checkpoint that is not damaged, or None; logs the damaged ones after it."""
    for path in reversed(checkpoints):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.info(f"{path}: this checkpoint is damaged ({damage}) and is skipped")
    return None


# State that optimizers keep in their parameter groups, beside the options from flags.
LEARNED_STATE = {"d", "d_max", "d_numerator", "k", "lr_max", "weight_sum", "train_mode", "scheduled_lr"}


def save_checkpoint(
    folder: Path, *, adapter: dict[str, torch.Tensor], learning: Any, state: TrainState, settings: dict
) -> None:
    """Writes the state of training into an existing folder. `write_manifest` must follow, after any other files."""
    # Serialized to bytes first, as these libraries' errors about a full disk name neither the file nor the reason.
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter.items()}
    (folder / "adapter.safetensors").write_bytes(save(tensors))
    scaler = learning.scaler
    states = {"optimizer": learning.optimizer.state_dict(), "lr_scheduler": learning.lr_scheduler.state_dict()}
    _save(states | {"scaler": None if scaler is None else scaler.state_dict()}, folder / "optimizer.pt")
    if learning.average is not None:
        _save(learning.average.state_dict(), folder / "ema.pt")
    (folder / "state.json").write_text(json.dumps({"state": asdict(state), "settings": settings}, indent=2) + "\n")


def write_checkpoint(
    output_dir: Path | str, add: Callable[[Path], Any], *, limit: int | None, state: TrainState, **stored: Any
) -> Path:
    """Writes the checkpoint of this step, reads it back, calls `prune_checkpoints`, and returns the folder.

    Args:
        add: `add(folder)` writes further files of the checkpoint.
        limit: The maximum number of checkpoints to keep, or None.
        stored: Further arguments of `save_checkpoint`.
    """
    path = Path(output_dir) / f"checkpoint-{state.global_step}"
    with written_whole(path, folder=True) as folder:
        save_checkpoint(folder, state=state, **stored)
        add(folder)
        write_manifest(folder)
    prune_checkpoints(output_dir, limit, newest=state.global_step)
    return path


def _save(value, path):
    data = io.BytesIO()
    torch.save(value, data)
    path.write_bytes(data.getbuffer())


def read_state(path: Path) -> tuple[TrainState, dict[str, Any]]:
    """Returns the `TrainState` and the settings of a checkpoint; raises `InputError` if they are not of the right types."""
    try:
        stored = read_json(path / "state.json", "state.json", remedy="")
        state = Values(stored.want("state", dict), "state.json", remedy="")
        if odd := state.keys() - STATE_KINDS.keys():
            raise state.refusal(f"'{min(odd)}' is no entry of a state")
        values = {name: state.want(name, *wanted) for name, wanted in STATE_KINDS.items()}
        return TrainState(**values), stored.want("settings", dict)
    except InputError as error:
        reason = str(error).removesuffix(".")
        raise InputError(f"{path}: this checkpoint can't be read ({reason}). Resume from another one.") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, for `load_checkpoint`; unpickles only tensors."""
    check_regular(path)
    with raising_input_errors(path):
        average = None
        if (path / "ema.pt").exists():
            average = torch.load(path / "ema.pt", map_location="cpu", weights_only=True)
        adapter = load_file(path / "adapter.safetensors")
        states = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        if not isinstance(states, dict):
            raise ValueError(f"optimizer.pt is of the wrong type, {type(states).__name__}")
        parts = {name: states[name] for name in ("optimizer", "lr_scheduler", "scaler")}
        return {"path": path, "adapter": adapter, "average": average, **parts}


def load_checkpoint(stored: dict[str, Any], learning: Any) -> dict[str, torch.Tensor]:
    """Restores the state that `read_checkpoint` returned, and returns the adapter's tensors."""
    optimizer, lr_scheduler, average = learning.optimizer, learning.lr_scheduler, learning.average
    with raising_input_errors(stored["path"]):
        state = check_optimizer_state(stored["optimizer"], optimizer, LEARNED_STATE)
        schedule = check_schedule(stored["lr_scheduler"], lr_scheduler)
        check_adapter(stored["adapter"])
        # The current flags override those of the checkpoint; only the learned state is restored.
        kept = {"params", "lr"} | LEARNED_STATE
        flags = [{k: v for k, v in group.items() if k not in kept} for group in optimizer.param_groups]
        base_lrs = lr_scheduler.base_lrs
        # Merged before loading too: the groups' options decide whether step counts are placed on the GPU.
        groups = [group | flag for group, flag in zip(state["param_groups"], flags, strict=True)]
        optimizer.load_state_dict(state | {"param_groups": groups})
        lr_scheduler.load_state_dict(schedule | {"base_lrs": base_lrs})
        factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
        lr_scheduler._last_lr = [base * factor for base, factor in zip(base_lrs, factors)]
        for group, flag, lr in zip(optimizer.param_groups, flags, lr_scheduler._last_lr):
            group.update(flag, lr=lr)
        if average is not None:
            device = average.shadow_params[0].device
            average.load_state_dict(check_like(stored["average"], average.state_dict(), "ema.pt"))
            average.to(device)
            average.decay = learning.ema_decay
        if learning.scaler is not None and stored["scaler"] is not None:
            scaler = check_like(stored["scaler"], learning.scaler.state_dict(), "the loss scaler")
            learning.scaler.load_state_dict(scaler)
    return stored["adapter"]


def describe_resume(stored: dict[str, Any], lr_scheduler: Any, schedule_name: str, num_steps: int) -> str:
    """Returns the line to log after `load_checkpoint`: the checkpoint, and how the learning rate changes if it does."""
    line = f"resuming from {stored['path']} (step {lr_scheduler.last_epoch})"
    before, now = stored["lr_scheduler"]["_last_lr"], lr_scheduler.get_last_lr()
    if before == now:
        return line
    return (
        f"{line}; the learning rate changes from {before[0]:.3g} to {now[0]:.3g}, according to --lr_scheduler "
        f"{schedule_name} over {num_steps} steps"
    )


@contextlib.contextmanager
def raising_input_errors(path: Path) -> Iterator[None]:
    """Converts the exceptions that damaged files raise to `InputError`."""
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path}: this checkpoint can't be loaded ({reason_of(error)}). Resume from another one."
        ) from error
    except pickle.UnpicklingError as error:  # the exception's message tells how to run code in the file
        raise InputError(
            f"{path}: this checkpoint can't be loaded (optimizer.pt is damaged or contains code). Resume from another one."
        ) from error


def check_same_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `InputError`, which names what differs, if a checkpoint belongs to another run."""
    before, now = _flat(before), _flat(json.loads(json.dumps(now)))  # `before` was read from JSON
    different = [
        f"{MEANINGS.get(key, key)} was {before[key]!r}, is {now[key]!r}"
        for key in now
        if before.get(key, now[key]) != now[key]
    ]
    if different:
        raise InputError(
            f"{path}: this checkpoint belongs to another run ({'; '.join(different)}). Pass another --output_dir, or "
            "--resume_from_checkpoint none to start over in this folder."
        )


def _flat(identity):
    """Returns an identity with an entry for each setting of its configurations, so that those of one version alone don't count."""
    flat = {}
    for name, value in identity.items():
        flat |= {f"{name} {key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def prune_checkpoints(output_dir: Path | str, limit: int | None, newest: int) -> None:
    """Deletes the oldest checkpoints beyond `limit`, and those of an abandoned run, which come after step `newest`.

    Also deletes what a killed run left while it wrote or deleted a checkpoint. Must be called after the newest checkpoint
    is written. That is read back first, and nothing is deleted if the disk does not return what was written.
    """
    checkpoints = list_checkpoints(output_dir)
    if (damage := find_damage(Path(output_dir) / f"checkpoint-{newest}")) is not None:
        logger.info(
            f"checkpoint-{newest} can't be read back ({damage}), so older checkpoints are kept: check the disk"
        )
        return
    for path in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    kept = [path for path in checkpoints if parse_step(path) <= newest]
    excess = 0 if limit is None else max(len(kept) - limit, 0)
    for path in checkpoints[len(kept) :] + kept[:excess]:
        remove_folder(path)
