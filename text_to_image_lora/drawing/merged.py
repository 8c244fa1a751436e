"""A base model with LoRAs merged into it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..files import written_whole
from ..models.dialects import COMPONENTS
from ..models.samplers import make_sampler
from .as_trained import in_words
from .pipeline import Studio, set_loras
from .rows import Lora


logger = logging.getLogger(__name__)


def save_merged(studio: Studio, loras: Sequence[Lora], folder: Path) -> None:
    """Writes the pipeline with the LoRAs merged into its weights, whole or not at all; the studio is used up by it."""
    import diffusers

    pipe, trained = studio.pipe, studio.as_trained
    active = [lora for lora in loras if lora.scale]
    set_loras(pipe, active)
    if active:
        pipe.fuse_lora(components=[part for part, adapters in pipe.get_list_adapters().items() if adapters])
    pipe.unload_lora_weights()
    for name in COMPONENTS[1:]:
        if getattr(pipe, name, None) is not None:
            # transformers 5 keeps the renaming of the LoRA's keys, and would write the encoder's own under such names.
            getattr(pipe, name)._weight_conversions = None
    components = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    components["scheduler"] = make_sampler(
        studio.scheduler_config, prediction_type=trained.prediction_type, zero_snr=bool(trained.zero_snr)
    )
    settings = ("requires_safety_checker", "force_zeros_for_empty_prompt")
    components |= {name: pipe.config[name] for name in settings if name in pipe.config}
    with written_whole(folder, folder=True) as temporary:
        getattr(diffusers, studio.family.pipeline_of())(**components).save_pretrained(temporary)
    for name in ("clip_skip", "long_prompts"):
        if value := getattr(trained, name):
            asked = f"is to be drawn with {in_words(name, value)}: ask for it where you draw"
            logger.warning("%s can't say that it %s", folder, asked)
