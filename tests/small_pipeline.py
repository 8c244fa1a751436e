"""The smallest Stable Diffusion pipeline that its real classes allow, and LoRAs for its models.

Nothing is imported that is missing in the environment of `make test-newest`.
"""

import copy

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


# The layers that are trained by default, and two others.
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # what --train_text_encoder adapts

# Every way to have a scale other than 1, and DoRA, whose norm depends on the scale.
ADAPTERS = {
    "alpha": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "dora": {"lora_alpha": 6, "use_dora": True},
    "patterns": {"lora_alpha": 6, "rank_pattern": {"to_q|q_proj": 2}, "alpha_pattern": {"to_k|k_proj": 1}},
}


def small_pipeline():
    """Returns a `StableDiffusionPipeline` with random weights and a tokenizer of ten letters."""
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *(letter + end for letter in "abcdefghij" for end in ("", "</w>"))]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def trained(model, targets, **options):
    """Returns a copy of the model with an adapter whose lora_B and DoRA magnitudes differ from their initial values."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + torch.rand(parameter.shape)
    return model.eval()


def trained_models(base, options):
    """Returns the UNet and the text encoder, each with an adapter."""
    return {
        "unet": trained(base.unet, UNET_TARGETS, **options),
        "text_encoder": trained(base.text_encoder, TEXT_TARGETS, **options),
    }


def adapters_of(models):
    """Returns {component: (tensors of the adapter, its configuration)}."""
    return {name: adapter(model) for name, model in models.items()}


def adapter(model):
    """Returns the tensors of the adapter and its configuration."""
    return get_peft_model_state_dict(model), model.peft_config["default"]


def pipeline_with(base, **components):
    """Returns the base's pipeline with the given components and copies of all others."""
    parts = {name: copy.deepcopy(part) for name, part in base.components.items() if name not in components}
    pipe = StableDiffusionPipeline(**parts, **components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def predict(unet):
    torch.manual_seed(2)
    return unet(torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 8, 16)).sample


@torch.no_grad()
def encode(text_encoder):
    return text_encoder(torch.tensor([[0, 3, 5, 7, 9, 11, 1, 1]])).last_hidden_state


def draw(pipe):
    return pipe("ab cd", num_inference_steps=2, generator=torch.manual_seed(3), output_type="np").images


def assert_close(got, wanted):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)


def assert_differs(got, other):
    assert (torch.as_tensor(got) - torch.as_tensor(other)).abs().max() > 1e-2
