"""Training state on disk: written whole or not at all, read back without unpickling code."""

import contextlib
import json
import pickle
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import InputError
from ..files import reason_of, remove_folder


@dataclass
class TrainState:
    """Where a run is. Epoch, sample order and every draw follow from `global_step` and `seed`."""

    seed: int
    global_step: int = 0
    started_at: int | None = None  # when the run began, in seconds since 1970: its files tell it
    tracker_run_id: str | None = None
    validation: dict | None = None  # what the judge of the run keeps, as it gave it
    batch_size: int | None = None  # what --train_batch_size auto found


def list_checkpoints(output_dir):
    """The complete `checkpoint-N` folders, oldest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / "state.json").is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def find_checkpoint(output_dir, wanted):
    """The folder that `--resume_from_checkpoint` means; None for "none", and where `latest` finds nothing to go on from."""
    if wanted == "none":
        return None
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    for path in (Path(wanted), Path(output_dir) / Path(wanted).name):
        if (path / "state.json").is_file():
            return path
    names = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
    raise InputError(
        f"{wanted}: this is not a checkpoint (--resume_from_checkpoint). In {output_dir} there are: {names}."
    )


# What optimizers keep of a run in their parameter groups, beside what the flags say.
LEARNT = {"d", "d_max", "d_numerator", "k", "lr_max", "weight_sum", "train_mode", "scheduled_lr"}


def save_checkpoint(folder, *, adapter, optimizer, lr_scheduler, scaler, state, settings, average=None):
    """Writes all that is needed to go on into `folder` (already there, as `written_whole` gives it)."""
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in adapter.items()}, folder / "adapter.safetensors"
    )
    torch.save(
        {
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        },
        folder / "optimizer.pt",
    )
    if average is not None:
        torch.save(average, folder / "ema.pt")
    (folder / "state.json").write_text(json.dumps({"state": asdict(state), "settings": settings}, indent=2) + "\n")


def read_state(path):
    """The `TrainState` and the settings of a checkpoint."""
    try:
        stored = json.loads((path / "state.json").read_text())
        return TrainState(**stored["state"]), stored["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: this checkpoint can't be read ({error}). Resume from another one.") from error


def read_checkpoint(path):
    """What `save_checkpoint` wrote, as a dict for `load_checkpoint`; nothing is unpickled but tensors."""
    with refusing(path):
        return {
            "path": path,
            "adapter": load_file(path / "adapter.safetensors"),
            "average": torch.load(path / "ema.pt", map_location="cpu", weights_only=True)
            if (path / "ema.pt").exists()
            else None,
            **torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        }


def load_checkpoint(stored, *, optimizer, lr_scheduler, scaler, average=None):
    """Puts optimizer, schedule, loss scale and moving average back, and returns the adapter's tensors.

    `stored` is what `read_checkpoint` gave.
    """
    with refusing(stored["path"]):
        # What the flags say now holds: only what was learnt comes from the checkpoint.
        kept = {"params", "lr"} | LEARNT
        flags = [{k: v for k, v in group.items() if k not in kept} for group in optimizer.param_groups]
        base_lrs = lr_scheduler.base_lrs
        # Before it is loaded too: whether a step count lies on the GPU follows from what the groups say.
        groups = [group | flag for group, flag in zip(stored["optimizer"]["param_groups"], flags, strict=True)]
        optimizer.load_state_dict(stored["optimizer"] | {"param_groups": groups})
        lr_scheduler.load_state_dict(stored["lr_scheduler"] | {"base_lrs": base_lrs})
        factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
        lr_scheduler._last_lr = [base * factor for base, factor in zip(base_lrs, factors)]
        for group, flag, lr in zip(optimizer.param_groups, flags, lr_scheduler._last_lr):
            group.update(flag, lr=lr)
        if average is not None:
            device = average.shadow_params[0].device
            average.load_state_dict(stored["average"])
            average.to(device)
        if scaler is not None and stored["scaler"] is not None:
            scaler.load_state_dict(stored["scaler"])
    return stored["adapter"]


@contextlib.contextmanager
def refusing(path):
    """Turns what damaged files raise into an `InputError`."""
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path}: this checkpoint can't be loaded ({reason_of(error)}). Resume from another one."
        ) from error
    except pickle.UnpicklingError as error:  # its own message says how to run the code in the file
        raise InputError(
            f"{path}: this checkpoint can't be loaded (optimizer.pt is damaged, or holds code). Resume from another one."
        ) from error


def check_same_run(path, before, now):
    """Raises `InputError` where a checkpoint belongs to another run: names what differs."""
    different = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key, now[key]) != now[key]]
    if different:
        raise InputError(
            f"{path}: it belongs to another run ({'; '.join(different)}). Pass another --output_dir, or "
            "--resume_from_checkpoint none to start over in this one."
        )


def prune_checkpoints(output_dir, limit, newest):
    """Deletes the oldest checkpoints beyond `limit`, and those after step `newest`, of a run that was given up.

    Called after the new one is in place.
    """
    checkpoints = list_checkpoints(output_dir)
    given_up = [path for path in checkpoints if int(path.name.partition("-")[2]) > newest]
    kept = checkpoints[: len(checkpoints) - len(given_up)]
    for path in given_up + (kept[: max(len(kept) - limit, 0)] if limit is not None else []):
        remove_folder(path)
