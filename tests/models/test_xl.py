"""Stable Diffusion XL: its real geometry, its numbers compared with diffusers, and its single files."""

import json
import shutil

import pytest
import torch
from conftest import make_picture_set, read_metrics, train_script, write_pictures
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from family_fixtures import true_xl
from original_weights import renamed, vae_to_ldm
from safetensors.torch import load_file, save_file

from text_to_image_lora.drawing.as_trained import AsTrained
from text_to_image_lora.drawing.find import find_base, find_lora
from text_to_image_lora.drawing.fits import check_lora_fits
from text_to_image_lora.drawing.pipeline import Job, load_pipeline
from text_to_image_lora.drawing.settings import Model
from text_to_image_lora.errors import InputError
from text_to_image_lora.models import kohya, loading, lora, lora_file, original_names, receipt, samplers
from text_to_image_lora.models.families import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from text_to_image_lora.models.settings import LoraSettings
from text_to_image_lora.pictures.transforms import Variation, apply_variation, corner_shown
from text_to_image_lora.training.batches import Division, Sample, make_batch_sampler
from text_to_image_lora.training.data import Draws, TrainingSet
from text_to_image_lora.training.inputs import find_inputs


RANK = 16


@pytest.fixture
def xl():
    """Returns the UNet and the text encoders of stable-diffusion-xl-base-1.0 on the meta device."""
    return {name: model for name, model in true_xl().items() if name != "vae"}


def components_of(models):
    return {name: lora.adapter_state(model) for name, model in models.items()}


def test_its_layers_are_all_adapted(xl):
    with torch.device("meta"):
        count = lora.add_lora(
            xl["unet"], LoraSettings(rank=RANK, lora_alpha=RANK, target_modules=STABLE_DIFFUSION_XL.target_modules)
        )
    lora.check_count(xl["unet"], count, STABLE_DIFFUSION_XL.modules_per_block)
    assert count == 700
    assert sum(parameter.numel() for parameter in lora.trainable_parameters(xl["unet"])) == 41_861_120


def test_all_that_kohya_adapts_has_its_names(xl, tmp_path):
    """722 + 72 + 192 modules: attention, feed-forward and projections of the UNet, and every layer of the encoders."""
    shapes, layers = {}, {name: receipt.layer_shapes(model) for name, model in xl.items()}
    targets = {"unet": [*STABLE_DIFFUSION_XL.target_modules, "proj_in", "proj_out"]}
    targets |= {name: lora.text_layers(xl[name]) for name in ("text_encoder", "text_encoder_2")}
    with torch.device("meta"):
        counts = [
            lora.add_lora(xl[name], LoraSettings(rank=1, lora_alpha=1, target_modules=targets[name])) for name in xl
        ]
    assert counts == [722, 72, 192]
    # Random weights for models on the meta device.
    components = {
        name: ({key: torch.randn(value.shape) for key, value in state_dict.items()}, config)
        for name, (state_dict, config) in components_of(xl).items()
    }
    path = kohya.save_kohya(tmp_path / "xl.safetensors", components, {}, names=STABLE_DIFFUSION_XL.kohya)
    shapes = {key: tuple(value.shape) for key, value in load_file(path).items()}
    assert len(shapes) == 3 * (722 + 72 + 192)
    known = {
        "lora_unet_input_blocks_4_1_proj_in": (640, 640),
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k": (1280, 2048),
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (10240, 1280),
        "lora_unet_output_blocks_0_1_transformer_blocks_9_attn1_to_out_0": (1280, 1280),
        "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2": (640, 2560),
        "lora_te1_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": (1280, 1280),
    }
    for name, (out, inner) in known.items():
        assert shapes[f"{name}.lora_up.weight"] == (out, 1)
        assert shapes[f"{name}.lora_down.weight"] == (1, inner)
    assert {name[: name.index("_", 10)] for name in shapes if name.startswith("lora_unet")} == {
        "lora_unet_input", "lora_unet_middle", "lora_unet_output"
    }  # fmt: skip
    assert receipt.check_lora_file(path, components, layers, by_kohyas_names=True) == 722 + 72 + 192
    assert receipt.check_lora_file(lora_file.save_lora(tmp_path, components, {}), components, layers) == 986
    again, _ = lora_file.load_lora(path)
    assert kohya.guess_family(again) is STABLE_DIFFUSION_XL


def test_every_layer_of_its_unet_has_a_name_that_means_it(xl):
    names = receipt.layer_shapes(xl["unet"])
    found = {module: original_names.original_name(module) for module in names}
    assert len(set(found.values())) == len(names) == 794
    assert {name.replace(".", "_") for name in names} == {
        original_names.diffusers_name(name).replace(".", "_") for name in found.values()
    }
    assert found["up_blocks.0.upsamplers.0.conv"] == "output_blocks_2_2_conv"
    assert found["down_blocks.0.downsamplers.0.conv"] == "input_blocks_3_0_op"
    assert found["add_embedding.linear_2"] == "label_emb_0_2"
    assert found["up_blocks.2.resnets.2.conv_shortcut"] == "output_blocks_8_0_skip_connection"
    assert original_names.original_name("down_blocks.0.resnets.2.conv1") is None  # of a UNet with other blocks


def test_the_corner_is_that_of_the_mirrored_picture():
    """Like diffusers' script, which flips before it crops. The columns of the picture show their position."""
    from PIL import Image

    columns = Image.linear_gradient("L").rotate(90).resize((80, 40)).convert("RGB")
    for flip in (False, True):
        variation = Variation(left=10, top=0, flip=flip)
        left, top = corner_shown(80, 40, variation, (40, 40))
        assert (left, top) == (30 if flip else 10, 0)
        whole = columns.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else columns
        shown = apply_variation(columns, variation, (40, 40))
        assert shown.tobytes() == whole.crop((left, top, left + 40, top + 40)).tobytes()


@pytest.mark.parametrize("flip", [False, True])
def test_the_first_loss_is_that_of_diffusers_computation(tiny_xl, train, pictures, flip):
    """Computes time ids, both encodings and the prediction with stock classes, like diffusers' XL script."""
    out = train(
        pretrained_model_name_or_path=tiny_xl, train_batch_size=4, max_train_steps=1, center_crop=True,
        random_flip=flip,
    )  # fmt: skip
    base = loading.find_base_model(str(tiny_xl))
    training_set = TrainingSet(make_picture_set(pictures, center_crop=True, random_flip=flip), base, Draws(0, 1000))
    sampler = make_batch_sampler(training_set.pictures, 0, Division(batch_size=4))
    batch = torch.utils.data.default_collate(
        [training_set[Sample(int(i), 0, k, 0.25)] for k, i in enumerate(sampler.samples_of(0))]
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_xl, add_watermarker=False)
    embeds, _, pooled, _ = pipe.encode_prompt(batch["captions"], device="cpu", do_classifier_free_guidance=False)
    scheduler = DDPMScheduler.from_pretrained(tiny_xl, subfolder="scheduler")
    with torch.no_grad():
        pixels = batch["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = pipe.vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * pipe.vae.config.scaling_factor
        noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
        # Resizing does not change pictures of 40x32, and the centre crop begins 4 pixels from either side.
        time_ids = pipe._get_add_time_ids((32, 40), (0, 4), (32, 32), torch.float32, 64).expand(4, -1)
        assert torch.equal(batch["condition"]["time_ids"], time_ids)
        more = {"text_embeds": pooled, "time_ids": time_ids}
        predicted = pipe.unet(noisy, batch["timesteps"], embeds, added_cond_kwargs=more).sample
        loss = torch.nn.functional.mse_loss(predicted, batch["noise"])
    assert read_metrics(out)[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_time_ids_are_those_of_each_size(tiny_xl, train, tmp_path):
    """Original size, corner of the crop and target size, each as (height, width); from the cache as well as live."""
    folder = write_pictures(tmp_path / "wide", count=3, size=(90, 50))
    flags = dict(
        pretrained_model_name_or_path=tiny_xl, train_data_dir=folder, resolution=[48, 32], center_crop=True,
        train_batch_size=2, max_train_steps=4, learning_rate=1e-4,
    )  # fmt: skip
    live, cached = (
        train(output_dir=tmp_path / str(variations), cache_variations=variations, **flags) for variations in (0, 1)
    )
    losses = [[row["train_loss"] for row in read_metrics(out)] for out in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    pictures = make_picture_set(folder, center_crop=True).at_sizes([[(48, 48), (32, 32)]] * 3)
    training_set = TrainingSet(pictures, loading.find_base_model(str(tiny_xl)), Draws(0, 1000))
    time_ids = [training_set[Sample(i, 0, 0, 1.0)]["condition"]["time_ids"].tolist() for i in (2, 3)]
    assert time_ids == [[50, 90, 0, 19, 48, 48], [50, 90, 0, 12, 32, 32]]  # resized to 86x48 and to 57x32


# Single files.

UNET_RULES = [
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2.conv"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"block(s\.\d+)?\.([02])\.norm1", r"block\1.\2.in_layers.0"),
    (r"block(s\.\d+)?\.([02])\.conv1", r"block\1.\2.in_layers.2"),
    (r"block(s\.\d+)?\.([02])\.norm2", r"block\1.\2.out_layers.0"),
    (r"block(s\.\d+)?\.([02])\.conv2", r"block\1.\2.out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
]
OPENCLIP_RULES = [
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn", "attn"),
]


def openclip(state_dict, prefix):
    """Returns a text encoder with OpenCLIP's names: query, key and value in one matrix, the projection transposed."""
    found = renamed(state_dict, OPENCLIP_RULES, prefix)
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        found[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    if f"{prefix}text_projection.weight" in found:
        found[f"{prefix}text_projection"] = found.pop(f"{prefix}text_projection.weight").T.contiguous()
    return found


@pytest.fixture(scope="module")
def xl_file(tiny_xl, tmp_path_factory):
    """Returns the weights of `tiny_xl` with the names of Stability's single file."""
    unet, first, second = (
        load_file(next((tiny_xl / name).glob("*.safetensors"))) for name in ("unet", "text_encoder", "text_encoder_2")
    )
    path = tmp_path_factory.mktemp("single") / "xl.safetensors"
    tensors = renamed(unet, UNET_RULES, "model.diffusion_model.") | vae_to_ldm(tiny_xl)
    tensors |= renamed(first, [], "conditioner.embedders.0.transformer.")
    save_file(tensors | openclip(second, "conditioner.embedders.1.model."), path)
    return path


def test_a_single_file_is_the_folder(tiny_xl, xl_file):
    base = loading.find_base_model(str(xl_file))
    assert (base.family, base.resolution, base.pooled_dim) == (STABLE_DIFFUSION_XL, 1024, 1280)
    base = loading.find_base_model(str(xl_file), single_file_config=str(tiny_xl))
    assert (base.resolution, base.pooled_dim, base.cross_attention_dim) == (32, 64, 96)
    here = loading.load_components(loading.find_base_model(str(tiny_xl)))
    file = loading.load_components(base)
    for one, two in zip(
        (*here.text_encoders, here.vae, here.denoiser), (*file.text_encoders, file.vae, file.denoiser)
    ):
        assert one.state_dict().keys() == two.state_dict().keys()
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("key", "name", "resolution"),
    [
        ("cond_stage_model.transformer.text_model.x", "Stable Diffusion 1", 512),
        ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2", 768),
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL", 1024),
    ],
)
def test_a_single_file_tells_its_family(tmp_path, key, name, resolution):
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({key: torch.zeros(1), unet: torch.zeros(8, 4, 3, 3)}, tmp_path / "base.safetensors")
    base = loading.find_base_model(str(tmp_path / "base.safetensors"))
    assert (base.family.name, base.resolution) == (name, resolution)


@pytest.mark.parametrize("keys", [pytest.param(["v_pred"], marks=pytest.mark.long), ["v_pred", "ztsnr"]])
def test_a_single_file_says_that_it_predicts_v(tiny_xl, xl_file, train, tmp_path, keys):
    path = tmp_path / "v.safetensors"
    save_file(load_file(xl_file) | {key: torch.zeros(0) for key in keys}, path)
    out = train(
        pretrained_model_name_or_path=path,
        single_file_config=tiny_xl,
        validation_prompt="a red axe",
        max_train_steps=1,
    )
    header = lora_file.load_lora(out)[1]
    assert header["prediction_type"] == "v_prediction"
    assert header["rescale_betas_zero_snr"] == str("ztsnr" in keys)
    model = find_base(Model(str(path), single_file_config=tiny_xl))
    assert model.model.family is STABLE_DIFFUSION_XL
    assert (model.prediction_type, model.zero_snr) == ("v_prediction", "ztsnr" in keys or None)
    pipe = load_pipeline(Job(model, (), AsTrained()), torch.float32)
    assert isinstance(pipe, StableDiffusionXLPipeline)


# Components of different families.


def test_a_lora_of_another_family_is_refused_with_both_names(tiny_xl, tiny_sd2, tmp_path):
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"
    for width, name in ((768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "Stable Diffusion XL")):
        path = tmp_path / f"{width}.safetensors"
        save_file({key.format("A"): torch.zeros(4, width), key.format("B"): torch.zeros(640, 4)}, path)
        words = ["--pretrained_model_name_or_path", "", "--train_data_dir", "pictures", "--lora_weights", str(path)]
        for base, own in ((tiny_xl, "Stable Diffusion XL"), (tiny_sd2, "Stable Diffusion 2")):
            if own != name:
                words[1] = str(base)
                with pytest.raises(InputError, match=f"it is a LoRA of {name}, but {base} is of {own}"):
                    find_inputs(train_script.parse_settings(words))
        drawn_lora = find_lora(str(path), 1.0, "lora0")
        with pytest.raises(InputError, match="2 of its 2 keys match no layer of the model"):
            check_lora_fits(drawn_lora, {"unet.x.attn2.to_k.weight": (8, 7)})
        other = STABLE_DIFFUSION if width != 768 else STABLE_DIFFUSION_XL
        with pytest.raises(InputError, match=f"is of {name}, but the base model is of {other.name}"):
            check_lora_fits(drawn_lora, {"unet.x.attn2.to_k.weight": (8, other.cross_attention_dim)})


def test_bases_of_other_families_are_refused_by_name(tiny_sd, xl_file, tmp_path):
    with pytest.raises(
        InputError, match=r"it is of Stable Diffusion XL, but .* \(--single_file_config\) is of Stable Diff"
    ):
        loading.find_base_model(str(xl_file), single_file_config=str(tiny_sd))
    for key, name in (
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.proj.weight", "Flux"),
        ("conditioner.embedders.0.model.ln_final.weight", "Stable Diffusion XL's refiner"),
    ):
        save_file({key: torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(
            InputError, match=f"a model of {name}, which is not supported; supported: StableDiffusionPipeline"
        ):
            loading.find_base_model(str(tmp_path / "other.safetensors"))
    with pytest.raises(InputError, match="a EDMEulerScheduler, a kind of diffusion that can't be trained here"):
        samplers.make_noise_scheduler({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5})


def test_a_unet_that_is_not_what_the_folder_says(tiny_xl, tmp_path):
    shutil.copytree(tiny_xl, tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": StableDiffusionPipeline.__name__}))
    with pytest.raises(
        InputError, match="its UNet is of Stable Diffusion XL, but model_index.json names the pipeline of"
    ):
        loading.find_base_model(str(tmp_path / "model"))


def test_clip_skip_counts_the_layer_that_is_not_used(tiny_xl, pictures):
    words = ["--pretrained_model_name_or_path", str(tiny_xl), "--train_data_dir", str(pictures), "--clip_skip"]
    message = "has only 3 layers, 1 of which Stable Diffusion XL does not use"
    with pytest.raises(InputError, match=message):
        find_inputs(train_script.parse_settings([*words, "2"]))


def test_the_losses_of_single_pictures_are_reported(tiny_xl, train):
    out = train(pretrained_model_name_or_path=tiny_xl, debug_loss=True, train_batch_size=3, validation_epochs=0)
    rows = [{k: v for k, v in row.items() if k.startswith("loss_for_")} for row in read_metrics(out)[:2]]
    assert [len(row) for row in rows] == [3, 3]
    assert set(rows[0]) | set(rows[1]) == {f"loss_for_{i}.png" for i in range(6)}
    for row, own in zip(read_metrics(out), rows):
        assert row["train_loss"] == pytest.approx(sum(own.values()) / 3, rel=1e-5)


def test_flash_attention_of_npus_needs_one(train):
    with pytest.raises(InputError, match="--enable_npu_flash_attention needs an Ascend NPU"):
        train(enable_npu_flash_attention=True)
