"""Preservation of the base model for prompts without the concept (--preservation output).

A LoRA also changes pictures whose prompt does not ask for the concept. To prevent this, the sampler repeats a share of the
samples: the same noisy latents, with a caption without the concept (`pictures.captions.ConceptRemover`), and with the base
model's own prediction as the target. Nothing but the base model is needed, and the result is an ordinary LoRA.
"""

from typing import Any

import torch

from ..models.lora import without_adapters


def num_preserved(batch: dict[str, Any]) -> int:
    """Returns the number of samples at the end of a batch that preserve the base model."""
    return int(batch["preserves_on_cpu"].sum()) if "preserves_on_cpu" in batch else 0


@torch.no_grad()
def with_base_predictions(
    target: torch.Tensor, models: Any, noisy_latents: torch.Tensor, batch: dict[str, Any]
) -> torch.Tensor:
    """Returns the target (N, C, H, W) with that of the preserved samples replaced by the base model's predictions.

    The adapters are disabled meanwhile, also those of text encoders that are trained.
    """
    count = num_preserved(batch)
    if not count:
        return target
    condition = {name: value[-count:] for name, value in batch["condition"].items()}
    with without_adapters(*models.adapted.values()):
        if models.trains_text_encoder:
            condition |= models.prompt_encoder(batch["captions"][-count:])
        base_pred = models.family.predict(
            models.denoiser, noisy_latents[-count:].to(models.dtype), batch["timesteps"][-count:], **condition
        )
    return torch.cat([target[:-count], base_pred.to(target.dtype)])
