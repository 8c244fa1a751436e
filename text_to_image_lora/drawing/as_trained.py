"""Chooses the settings that a LoRA was trained with, unless flags override them. Needs no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..models.samplers import NO_ZERO_SNR
from .find import Base, vae_channels
from .rows import Lora


class AsTrained(NamedTuple):
    """Settings of a LoRA's training that pictures are drawn with; None stands for the setting of the base model."""

    prediction_type: str | None = None
    zero_snr: bool | None = None  # zero terminal SNR
    long_prompts: bool | None = None  # prompts are encoded completely, in chunks
    num_chunks: int | None = None  # minimum number of chunks per prompt
    clip_skip: int | None = None  # number of last layers of the text encoder to skip
    vae: str | None = None


class Entry(NamedTuple):
    """An entry of a LoRA file's header that records a setting of its training."""

    key: str
    parse: Callable[[str], Any]  # returns the value of the header's string, or None for the usual value
    description: str  # in messages; {} stands for the value


def _at_least(least):
    return lambda text: int(text) if text.isdecimal() and len(text) < 10 and int(text) >= least else None


ENTRIES = {  # {field of `AsTrained`: entry}
    "prediction_type": Entry("prediction_type", {"epsilon": "epsilon", "v_prediction": "v_prediction"}.get, "{}"),
    "zero_snr": Entry("rescale_betas_zero_snr", {"True": True}.get, "zero terminal SNR"),
    "long_prompts": Entry("long_prompts", {"True": True}.get, "long prompts"),
    "num_chunks": Entry("num_chunks", _at_least(2), "{} chunks per prompt"),
    "clip_skip": Entry("clip_skip", _at_least(1), "clip skip {}"),
    "vae": Entry(
        "pretrained_vae_model_name_or_path", lambda text: text if text not in ("", "None") else None, "the VAE {}"
    ),
}

# A LoRA file with one of these entries was written by this project.
OUR_KEYS = {"pretrained_model_name_or_path", *(entry.key for entry in ENTRIES.values())}


def in_words(name: str, value: Any) -> str:
    """Describes a field of `AsTrained` in a message."""
    return ENTRIES[name].description.format(value).replace("v_pred", "v-pred")


def describe(header: dict[str, str]) -> str:
    """Lists how the LoRA with this header has to be drawn, for messages; "" for the usual settings."""
    values = {name: entry.parse(header.get(entry.key, "")) for name, entry in ENTRIES.items()}
    return ", ".join(in_words(name, value) for name, value in values.items() if value not in (None, "epsilon"))


def merge_training(parts: Sequence[tuple[str, dict[str, str]]]) -> dict[str, str]:
    """Returns the header entries of `ENTRIES` for the sum of LoRAs [(path, header)].

    LoRAs without this project's metadata have no say, except that ModelSpec's records their prediction type. Raises
    `InputError` if the others disagree; only long prompts suit all LoRAs, with the largest number of chunks.
    """
    merged = {}
    for name, entry in ENTRIES.items():
        recorded = [(path, text) for path, header in parts if (text := _recorded(name, header)) is not None]
        if not recorded:
            continue
        first, chosen = recorded[0]
        if name in ("long_prompts", "num_chunks"):
            chosen = max((text for _, text in recorded), key=lambda text: entry.parse(text) or 0)
        elif other := next((row for row in recorded if entry.parse(row[1]) != entry.parse(chosen)), None):
            raise InputError(
                f"{first} was trained with {entry.key} {chosen or 'none'}, {other[0]} with {other[1] or 'none'}, so their "
                "sum can't be drawn as both were trained. Draw them one at a time."
            )
        if chosen:
            merged[entry.key] = chosen
    return merged


def _recorded(name, header):
    """Returns what a LoRA's header says of an entry, "" for the usual value, or None if it does not record it."""
    if name == "prediction_type":
        of_modelspec = {"epsilon": "epsilon", "v": "v_prediction"}.get(header.get("modelspec.prediction_type", ""))
        return header.get(ENTRIES[name].key, of_modelspec)
    return header.get(ENTRIES[name].key, "") if OUR_KEYS & header.keys() else None


def settle(
    loras: Sequence[Lora], base: Base, scheduler: str | None, *, clip_skip: int | None = None, vae: str | None = None
) -> tuple[AsTrained, list[str]]:
    """Returns the settings to draw with, and notes for the user.

    Flags (`scheduler`, `clip_skip`, `vae`) override the LoRAs' training, which overrides the base model.

    Raises:
        InputError: The LoRAs were trained with different settings that no flag chooses, or `vae` is not a VAE.
    """
    own = AsTrained(base.prediction_type, base.zero_snr)._asdict()
    decided = {name: value for name, value in (("clip_skip", clip_skip), ("vae", vae)) if value is not None}
    trained = _read_training(loras, own, decided)
    obstacles = _obstacles(trained, scheduler, decided)
    subject = "the LoRAs were" if len(loras) > 1 else "the LoRA was"
    notes, used = [], []
    for name, value in trained.items():
        if value == own[name]:
            continue
        if name not in obstacles:
            used.append(in_words(name, value))
        elif obstacles[name]:
            what = f"{subject} trained with {in_words(name, value)}"
            notes.append(f"{what}; these pictures do not use it, because {obstacles[name]}")
    if used:
        listed = " and ".join(filter(None, (", ".join(used[:-1]), used[-1])))
        notes.append(f"{subject} trained with {listed}; these pictures are drawn accordingly")
    settled: dict[str, Any] = {name: own[name] if name in obstacles else value for name, value in trained.items()}
    settled |= decided
    return AsTrained(**settled), notes


def _read_training(loras, own, decided):
    """Returns {field of `AsTrained`: value} of the training; LoRA files without this project's metadata are ignored."""
    ours, trained = [lora for lora in loras if OUR_KEYS & lora.header.keys()], {}
    for name, entry in ENTRIES.items():
        values = [entry.parse(lora.header.get(entry.key, "")) or own[name] for lora in ours] or [own[name]]
        if name in ("long_prompts", "num_chunks"):  # the maximum, because every LoRA accepts more chunks
            values = [max(filter(None, values), default=None)]
        odd = next((i for i, value in enumerate(values) if value != values[0]), 0)
        if odd and name not in decided:
            remedy = f"Pass --{name} to choose" if name in ("clip_skip", "vae") else "Draw them one at a time"
            one = f"{ours[0].path} was trained with {entry.key} {values[0] or 'none'}"
            raise InputError(f"--lora {one}, {ours[odd].path} with {values[odd] or 'none'}. {remedy}.")
        trained[name] = values[0]
    return trained


def _obstacles(trained, scheduler, decided):
    """Returns {field of `AsTrained`: why it is not used}; the reason is "" if a flag has the same value."""
    obstacles = {}
    if scheduler in NO_ZERO_SNR:
        obstacles["zero_snr"] = f"--scheduler {scheduler} does not support it. Omit --scheduler or use ddim."
    vae = trained["vae"]
    if "vae" in decided:
        vae_channels(decided["vae"])
    elif vae and len(Path(vae).parts) == 1 and not Path(vae).exists():
        obstacles["vae"] = (
            "the LoRA's metadata contains only the last part of the VAE's path. Pass the full path with --vae."
        )
    elif vae:
        try:
            vae_channels(vae)
        except InputError as error:
            obstacles["vae"] = str(error)
    for name, value in decided.items():
        same = Path(str(value)).name == Path(str(trained[name])).name
        obstacles[name] = "" if same else f"--{name} {value} overrides it."
    return obstacles
