"""How LoRAs were trained decides how they are drawn, unless a flag says otherwise. Needs no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..models.samplers import NO_ZERO_SNR
from .find import Base, vae_channels
from .rows import Lora


class AsTrained(NamedTuple):
    """How pictures are drawn, as far as training decides it; None for the base model's own."""

    prediction_type: str | None = None
    zero_snr: bool | None = None  # zero terminal SNR
    long_prompts: bool | None = None  # prompts are read whole, in chunks
    num_chunks: int | None = None  # the least number of chunks of a prompt
    clip_skip: int | None = None  # last layers of the text encoder to leave out
    vae: str | None = None


class Entry(NamedTuple):
    """What the header of a LoRA file says of its training."""

    key: str
    value_of: Callable[[str], Any]  # of the string there; None for what is usual
    words: str  # of the value, for people


def _at_least(least):
    return lambda text: int(text) if text.isdecimal() and int(text) >= least else None


ENTRIES = {  # {field of `AsTrained`: entry}
    "prediction_type": Entry("prediction_type", {"epsilon": "epsilon", "v_prediction": "v_prediction"}.get, "{}"),
    "zero_snr": Entry("rescale_betas_zero_snr", {"True": True}.get, "zero terminal SNR"),
    "long_prompts": Entry("long_prompts", {"True": True}.get, "long prompts"),
    "num_chunks": Entry("num_chunks", _at_least(2), "{} chunks a prompt"),
    "clip_skip": Entry("clip_skip", _at_least(1), "clip skip {}"),
    "vae": Entry(
        "pretrained_vae_model_name_or_path", lambda text: text if text not in ("", "None") else None, "the VAE {}"
    ),
}


def in_words(name: str, value: Any) -> str:
    """A field of `AsTrained`, for people."""
    return ENTRIES[name].words.format(value).replace("v_pred", "v-pred")


def settle(
    loras: Sequence[Lora], base: Base, scheduler: str | None, *, clip_skip: int | None = None, vae: str | None = None
) -> tuple[AsTrained, list[str]]:
    """How to draw, and what to tell the user about it.

    Flags (`scheduler`, `clip_skip`, `vae`) come first, then what the LoRAs were trained with, then the base model's own.
    Raises `InputError` for LoRAs that were trained differently in what no flag decides, and for a VAE that is none.
    """
    own = AsTrained(base.prediction_type, base.zero_snr)._asdict()
    decided = {name: value for name, value in (("clip_skip", clip_skip), ("vae", vae)) if value is not None}
    trained = _training_of(loras, own, decided)
    obstacles = _obstacles(trained, scheduler, decided)
    subject = "the LoRAs were" if len(loras) > 1 else "the LoRA was"
    notes, taken = [], []
    for name, value in trained.items():
        if value == own[name]:
            continue
        if name not in obstacles:
            taken.append(in_words(name, value))
        elif obstacles[name]:
            what = f"{subject} trained with {in_words(name, value)}"
            notes.append(f"{what}; the pictures are not drawn so: {obstacles[name]}")
    if taken:
        listed = " and ".join(filter(None, (", ".join(taken[:-1]), taken[-1])))
        notes.append(f"{subject} trained with {listed}; the pictures are drawn so")
    settled: dict[str, Any] = {name: own[name] if name in obstacles else value for name, value in trained.items()}
    settled |= decided
    return AsTrained(**settled), notes


def _training_of(loras, own, decided):
    """How the LoRAs were trained, {field of `AsTrained`: value}; files without a header of ours have no say."""
    keys = {"pretrained_model_name_or_path", *(entry.key for entry in ENTRIES.values())}
    ours, trained = [lora for lora in loras if keys & lora.header.keys()], {}
    for name, entry in ENTRIES.items():
        values = [entry.value_of(lora.header.get(entry.key, "")) or own[name] for lora in ours] or [own[name]]
        if name in ("long_prompts", "num_chunks"):  # the most of them: the others take longer prompts too
            values = [max(filter(None, values), default=None)]
        odd = next((i for i, value in enumerate(values) if value != values[0]), 0)
        if odd and name not in decided:
            remedy = f"Pass --{name} to choose" if name in ("clip_skip", "vae") else "Draw them one at a time"
            one = f"{ours[0].path} was trained with {entry.key} {values[0] or 'none'}"
            raise InputError(f"--lora {one}, {ours[odd].path} with {values[odd] or 'none'}. {remedy}.")
        trained[name] = values[0]
    return trained


def _obstacles(trained, scheduler, decided):
    """Why pictures are not drawn as the LoRAs were trained, {field of `AsTrained`: reason}; "" where nothing is lost."""
    obstacles = {}
    if scheduler in NO_ZERO_SNR:
        obstacles["zero_snr"] = f"--scheduler {scheduler} can't. Leave it out, or take ddim."
    vae = trained["vae"]
    if "vae" in decided:
        vae_channels(decided["vae"])
    elif vae and len(Path(vae).parts) == 1 and not Path(vae).exists():
        obstacles["vae"] = "its header has the last part of the path alone. Pass --vae with the whole."
    elif vae:
        try:
            vae_channels(vae)
        except InputError as error:
            obstacles["vae"] = str(error)
    for name, value in decided.items():
        same = Path(str(value)).name == Path(str(trained[name])).name
        obstacles[name] = "" if same else f"--{name} {value} overrules it."
    return obstacles
