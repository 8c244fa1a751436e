"""The small base as a pipeline of diffusers, with or without a LoRA, and the pictures that it draws."""

from text_to_image_lora.models.samplers import SAMPLERS


def load_pipeline(model, lora=None, *, scheduler="dpm++"):
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
    """A picture of each prompt; the noise of picture i depends on the seed and i alone."""
    import torch

    images = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed * 100_003 + first + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=generators,
        ).images
    return images
