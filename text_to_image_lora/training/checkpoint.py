"""Training state on disk: written whole or not at all, read back without unpickling code."""

import contextlib
import hashlib
import io
import json
import logging
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..errors import InputError
from ..files import reason_of, remove_folder, written_whole


logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")


ALWAYS = ("state.json", MANIFEST)  # whatever a checkpoint holds


@dataclass
class TrainState:
    """Where a run is. Epoch, sample order and every draw follow from `global_step` and `seed`."""

    seed: int
    global_step: int = 0
    started_at: int | None = None  # when the run began, in seconds since 1970: its files tell it
    tracker_run_id: str | None = None
    validation: dict | None = None  # what the judge of the run keeps, as it gave it
    batch_size: int | None = None  # what --train_batch_size auto found
    due: list[str] = field(default_factory=list)  # what was still to be done after this step, when the run was stopped


def list_checkpoints(output_dir):
    """The `checkpoint-N` folders that are there, oldest first; whether they are whole, `damage_of` tells."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    # An empty folder is none of ours.
    return sorted((path for path in found if any((path / name).is_file() for name in ALWAYS)), key=step_of)


def step_of(path):
    """The step of a `checkpoint-N`."""
    return int(NAME.fullmatch(path.name)[1])


def find_checkpoint(output_dir, wanted):
    """The folder that `--resume_from_checkpoint` means; None for "none", and where `latest` finds nothing to go on from.

    `latest` passes over damaged ones, with a line for each; one that was asked for by its name is an `InputError` then.
    """
    if wanted == "none":
        return None
    if wanted == "latest":
        return newest_whole(list_checkpoints(output_dir))
    for path in (Path(wanted), Path(output_dir) / Path(wanted).name):
        if any((path / name).is_file() for name in ALWAYS):
            if (damage := damage_of(path)) is not None:
                raise InputError(f"{path}: this checkpoint is damaged ({damage}). Resume from another one.")
            return path
    names = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
    raise InputError(
        f"{wanted}: this is not a checkpoint (--resume_from_checkpoint). In {output_dir} there are: {names}."
    )


def newest_whole(checkpoints):
    """The last of these folders that is whole, or None; the damaged ones after it are told."""
    for path in reversed(checkpoints):
        damage = damage_of(path)
        if damage is None:
            return path
        logger.info(f"{path}: this checkpoint is damaged ({damage}) and passed over")
    return None


def write_manifest(folder):
    """Writes the size and the SHA-256 of each file of a checkpoint beside them; to be called when all others are there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = {path.relative_to(folder).as_posix(): _size_and_digest(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(rows, indent=2) + "\n")


def _size_and_digest(path):
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage_of(path):
    """What is wrong with the files of a checkpoint, as its manifest tells, in a few words; None where they are whole."""
    try:
        rows = json.loads((path / MANIFEST).read_text())
        for name, row in rows.items():
            if not (path / name).is_file():
                return f"{name} is not there"
            if _size_and_digest(path / name) != row:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is not there"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST}: {reason_of(error)}"
    return None if "state.json" in rows else f"{MANIFEST} names no state.json"


# What optimizers keep of a run in their parameter groups, beside what the flags say.
LEARNT = {"d", "d_max", "d_numerator", "k", "lr_max", "weight_sum", "train_mode", "scheduled_lr"}


def save_checkpoint(folder, *, adapter, learning, state, settings: dict):
    """Writes all that is needed to go on into `folder` (already there, as `written_whole` gives it).

    `write_manifest` makes it whole, when all else that belongs to it is there too.
    """
    # As bytes first: what these libraries say of a full disk names neither the file nor the reason.
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter.items()}
    (folder / "adapter.safetensors").write_bytes(save(tensors))
    scaler = learning.scaler
    states = {"optimizer": learning.optimizer.state_dict(), "lr_scheduler": learning.lr_scheduler.state_dict()}
    _save(states | {"scaler": None if scaler is None else scaler.state_dict()}, folder / "optimizer.pt")
    if learning.average is not None:
        _save(learning.average.state_dict(), folder / "ema.pt")
    (folder / "state.json").write_text(json.dumps({"state": asdict(state), "settings": settings}, indent=2) + "\n")


def write_checkpoint(output_dir, add, *, limit, state, **stored):
    """Writes the checkpoint of this step, reads it back, and deletes what `prune_checkpoints` says; returns its folder.

    `add(folder)` writes what else belongs to it; `stored` is what `save_checkpoint` wants.
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


def load_checkpoint(stored, learning):
    """Puts optimizer, schedule, loss scale and moving average back, and returns the adapter's tensors.

    `stored` is what `read_checkpoint` gave.
    """
    optimizer = learning.optimizer
    lr_scheduler = learning.lr_scheduler
    average = learning.average
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
            average.decay = learning.ema_decay
        if learning.scaler is not None and stored["scaler"] is not None:
            learning.scaler.load_state_dict(stored["scaler"])
    return stored["adapter"]


def where_it_goes_on(stored, lr_scheduler, schedule_name, num_steps):
    """In words, the checkpoint that a run goes on from, and how the learning rate changes there, where it does.

    To be asked after `load_checkpoint`, with what that was given.
    """
    line = f"going on from {stored['path']} (step {lr_scheduler.last_epoch})"
    before, now = stored["lr_scheduler"]["_last_lr"], lr_scheduler.get_last_lr()
    if before == now:
        return line
    return (
        f"{line}; the learning rate was {before[0]:.3g} there and is {now[0]:.3g} from here on, as {schedule_name} over "
        f"{num_steps} steps has it"
    )


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
    now = json.loads(json.dumps(now))  # as what was stored has come back
    different = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key, now[key]) != now[key]]
    if different:
        raise InputError(
            f"{path}: it belongs to another run ({'; '.join(different)}). Pass another --output_dir, or "
            "--resume_from_checkpoint none to start over in this one."
        )


def prune_checkpoints(output_dir, limit, newest):
    """Deletes the oldest checkpoints beyond `limit`, and those after step `newest`, of a run that was given up.

    Called after the new one is in place, which is read back first: where the disk doesn't give back what was written, the
    others stay. Of checkpoints that a killed run was writing or deleting nothing is left either.
    """
    checkpoints = list_checkpoints(output_dir)
    if (damage := damage_of(Path(output_dir) / f"checkpoint-{newest}")) is not None:
        logger.info(
            f"checkpoint-{newest} can't be read back ({damage}), so that no older one is deleted: look after the disk"
        )
        return
    for path in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    given_up = [path for path in checkpoints if step_of(path) > newest]
    kept = checkpoints[: len(checkpoints) - len(given_up)]
    for path in given_up + (kept[: max(len(kept) - limit, 0)] if limit is not None else []):
        remove_folder(path)
