"""Tiny pipelines of the other model families, made from config with stock classes, for 32 px pictures."""

import pytest


# The sizes of XL's text encoders, of the pooled embedding, and of each embedded number.
WIDTHS, POOLED, NUMBER = (32, 64), 64, 8


def tokenizers_of(folder):
    """Saves two tokenizers with equal vocabularies; as in Stable Diffusion XL, their padding tokens differ."""
    from transformers import CLIPTokenizer

    from scripts.mini_sd.model import write_tokenizer

    first = write_tokenizer(folder / "words")
    return first, CLIPTokenizer.from_pretrained(folder / "words", pad_token="!")


def text_config(tokenizer, width, **changes):
    from transformers import CLIPTextConfig

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4)
    return CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **sizes, **ids, **changes)


def tiny_vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, sample_size=32, **options,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory):
    """Saves a `StableDiffusionXLPipeline` with XL's kinds of blocks, but narrower and shallower: 110 adapted modules."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("tiny-xl")
    tokenizers = tokenizers_of(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4,
        attention_head_dim=(1, 2, 2), transformer_layers_per_block=(0, 1, 2), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=sum(WIDTHS), addition_embed_type="text_time", addition_time_embed_dim=NUMBER,
        projection_class_embeddings_input_dim=POOLED + 6 * NUMBER,
    )  # fmt: skip
    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    StableDiffusionXLPipeline(
        tiny_vae(scaling_factor=0.13025, force_upcast=True),
        CLIPTextModel(text_config(tokenizers[0], WIDTHS[0])),
        CLIPTextModelWithProjection(text_config(tokenizers[1], WIDTHS[1], projection_dim=POOLED, hidden_act="gelu")),
        *tokenizers, unet, EulerDiscreteScheduler(timestep_spacing="leading", **schedule), add_watermarker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory):
    """Saves a `StableDiffusionPipeline` like Stable Diffusion 2.1 at 768: OpenCLIP, linear projections, v-prediction."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("tiny-sd2")
    _, tokenizer = tokenizers_of(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=(1, 2),
        use_linear_projection=True, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64,
    )  # fmt: skip
    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **schedule)
    StableDiffusionPipeline(
        tiny_vae(), CLIPTextModel(text_config(tokenizer, 64, hidden_act="gelu", projection_dim=512)), tokenizer, unet,
        scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


def true_xl():
    """Returns {component: model} with the configuration of stable-diffusion-xl-base-1.0, on the meta device."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=1024, scaling_factor=0.13025,
        )  # fmt: skip
        first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
        second = CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280,
            hidden_act="gelu",
        )  # fmt: skip
        text_encoders = {"text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(second)}
    return {"unet": unet, "vae": vae, **text_encoders}
