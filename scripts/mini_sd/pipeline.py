"""Loads the embedded base model as a diffusers pipeline, with or without a LoRA, and draws pictures with it."""

from text_to_image_lora.models.samplers import SAMPLERS


def load_pipeline(model, lora=None, *, scheduler="dpm++"):
    """Returns the pipeline in float32 with a sampler of infer.py."""
    import diffusers
    import torch
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    sampler = SAMPLERS[scheduler]
    pipeline.scheduler = getattr(diffusers, sampler.scheduler).from_config(
        pipeline.scheduler.config, **sampler.changes
    )
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    return pipeline


def draw_with(pipeline, prompts, *, seed, guidance_scale, num_inference_steps, batch_size=24):
    """Draws a picture for each prompt; the noise of picture i depends only on the seed and i."""
    import torch

    images = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed * 100_003 + first + i) for i in range(len(batch))]
        images += pipeline(
            batch, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps, generator=generators
        ).images
    return images
