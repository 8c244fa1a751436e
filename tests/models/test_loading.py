"""Base models are loaded from folders, the hub cache, single files, and old pickles."""

import copy
import json
import pickle
import re
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import read_lora, refusal_of
from damaged_models import DAMAGES
from diffusers import AutoencoderKL, StableDiffusionPipeline
from original_weights import LIGHTNING, Attack, lightning_checkpoint, to_ldm
from PIL import Image
from safetensors.torch import load_file, save_file

from text_to_image_lora.errors import InputError
from text_to_image_lora.models import loading, samplers
from text_to_image_lora.models.modules import sample_identity, weights_identity


@pytest.fixture(scope="module")
def single_file(tiny_sd, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file(to_ldm(tiny_sd), path)
    return path


@pytest.fixture(scope="module")
def config_only(tiny_sd, tmp_path_factory):
    """Returns the base model's folder without weights, which may lie next to a single file."""
    folder = tmp_path_factory.mktemp("config") / "tiny"
    shutil.copytree(tiny_sd, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def load(name, pretrained_vae=None, **options):
    """Returns the `Components` of a base model."""
    return loading.load_components(loading.find_base_model(str(name), **options), pretrained_vae=pretrained_vae)


def test_find_a_folder(tiny_sd):
    base = loading.find_base_model(str(tiny_sd))
    assert (base.kind, base.source) == ("folder", str(tiny_sd))
    assert (base.image_factor, base.vae_factor, base.latent_channels, base.cross_attention_dim) == (8, 4, 4, 96)
    assert (base.latent_shape((64, 32)), base.condition_shapes(2)) == (
        (4, 8, 16), {"encoder_hidden_states": (154, 96)}
    )  # fmt: skip


def test_find_a_single_file(single_file, config_only):
    # The default of SD1.5, if there is no configuration.
    assert loading.find_base_model(str(single_file)).image_factor == 64
    base = loading.find_base_model(str(single_file), single_file_config=str(config_only))
    assert (base.kind, base.image_factor, base.cross_attention_dim) == ("file", 8, 96)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.safetensors", "gone.safetensors: there is no such file"),
        ("gone.ckpt", "gone.ckpt: there is no such file"),
        ("./gone", "./gone: there is no such folder or file"),
        ("a/b/c", "a/b/c: there is no such folder or file"),
        ("models/mini-sdd", "models/mini-sdd: neither a local folder nor a model that the hub provides"),
        ("empty", "empty: it does not contain a model_index.json"),
        ("other", "other: a StableDiffusion3Pipeline is not supported; supported: StableDiffusionPipeline"),
        ("broken", "broken/model_index.json: it can't be read"),
        ("part", "part/unet/config.json: it can't be read"),
    ],
)
def test_what_is_no_base_model_is_reported_in_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for folder, index in (
        ("other", '{"_class_name": "StableDiffusion3Pipeline"}'),
        ("broken", "{"),
        ("part", '{"_class_name": "StableDiffusionPipeline"}'),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_index.json").write_text(index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as error:
        loading.find_base_model(name)
    assert "\n" not in str(error.value)


def test_a_single_files_configuration_must_be_one(single_file, tmp_path):
    with pytest.raises(InputError, match=r"it does not contain a model_index.json \(--single_file_config\)"):
        loading.find_base_model(str(single_file), single_file_config=str(tmp_path))


def test_a_single_file_without_its_configuration_needs_the_hub(single_file):
    with pytest.raises(InputError, match="pass --single_file_config FOLDER") as error:
        load(single_file)
    assert "\n" not in str(error.value)


def test_load_a_folder(tiny_sd):
    (tokenizer,), (text_encoder,), vae, unet, scheduler_config = load(tiny_sd)
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    for model, wanted in ((text_encoder, stock.text_encoder), (vae, stock.vae), (unet, stock.unet)):
        assert same_weights(model, wanted)
        assert not model.training
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    assert tokenizer("a red axe").input_ids == stock.tokenizer("a red axe").input_ids
    assert scheduler_config["_class_name"] == "PNDMScheduler"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_load_in_half_precision(tiny_sd, single_file, kind):
    """The UNet and the text encoder are cast; the VAE is not, because some VAEs overflow in float16."""
    name, options = (tiny_sd, {}) if kind == "folder" else (single_file, {"single_file_config": str(tiny_sd)})
    base = loading.find_base_model(str(name), **options)
    whole, half = loading.load_components(base), loading.load_components(base, torch.bfloat16)
    for a, b in ((whole.denoiser, half.denoiser), (whole.text_encoders[0], half.text_encoders[0])):
        assert {value.dtype for value in b.parameters()} == {torch.bfloat16}
        assert sample_identity(a) == sample_identity(b)
        assert same_weights(a.to(torch.bfloat16), b)
    assert {value.dtype for value in half.vae.parameters()} == {torch.float32}
    assert same_weights(whole.vae, half.vae)


@pytest.mark.parametrize("names", ["one file", "variant", "shards", "mixed"])
def test_weights_are_read_from_a_files_map_to_their_place(tiny_sd, tmp_path, monkeypatch, names):
    """Weights are copied once and have the values that diffusers loads; the file may be changed afterwards."""
    shutil.copytree(tiny_sd, tmp_path / "model")
    folder, variant = tmp_path / "model" / "unet", "fp16" if names == "variant" else None
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
    if names == "mixed":  # as the embedded base has it
        unet.conv_norm_out.weight.data = torch.linspace(1, 1.001, len(unet.conv_norm_out.weight))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    for other in ("vae/diffusion_pytorch_model", "text_encoder/model") if variant else ():
        shutil.move(folder.parent / f"{other}.safetensors", folder.parent / f"{other}.{variant}.safetensors")
    unet.save_pretrained(folder, variant=variant, max_shard_size="100KB" if names == "shards" else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 1 or names != "shards"
    base, mapped = loading.find_base_model(str(tmp_path / "model"), variant=variant), []
    monkeypatch.setattr(loading, "place", lambda model, *_, **__: mapped.append(next(model.parameters()).dtype))
    loading.load_components(base)
    monkeypatch.undo()
    assert mapped == [torch.float32 if names == "mixed" else torch.float16]
    loaded = loading.load_components(base, channels_last=True).denoiser
    stock = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32, variant=variant)
    wanted = copy.deepcopy(stock)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert same_weights(loaded, wanted)
    assert loaded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not loaded.conv_in.weight.is_contiguous()


# diffusers 0.39 passes an argument that huggingface_hub 1.x no longer knows.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")
@pytest.mark.parametrize("revision", [None, "fixed"])
def test_load_from_the_hubs_cache_without_a_network(tiny_sd, single_file, tmp_path, revision):
    """The cache contains only the requested revision; without a revision, nothing is found."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / (revision or "main")).write_text("a" * 40)
    shutil.copytree(tiny_sd, repository / "snapshots" / ("a" * 40))
    base = loading.find_base_model("owner/tiny", revision=revision, cache_dir=tmp_path / "hub")
    here = load(tiny_sd)
    assert (base.kind, base.image_factor) == ("hub", 8)
    there = loading.load_components(base)
    assert loading.load_tokenizer(base)("a red axe").input_ids == here.tokenizers[0]("a red axe").input_ids
    assert same_weights(there.text_encoders[0], here.text_encoders[0])
    assert same_weights(there.vae, here.vae)
    assert same_weights(there.denoiser, here.denoiser)
    assert there.scheduler_config == here.scheduler_config
    # A VAE in a single file has no configuration.
    assert same_weights(loading.load_components(base, pretrained_vae=str(single_file)).vae, here.vae)


@pytest.fixture(scope="module")
def from_folder(train_in, tmp_path_factory):
    """A run on the folder, with which runs on other forms of the model or with another VAE are compared."""
    folder = tmp_path_factory.mktemp("from-folder")
    return folder, train_in(folder, **FLAGS)


FLAGS = dict(validation_prompt="a red axe", clip_skip=1)


def drawn(output_dir, step):
    with Image.open(output_dir / f"validation/step-{step:06d}/prompt-00-0.png") as image:
        return image.tobytes()


def test_training_from_a_single_file_equals_training_from_the_folder(from_folder, train, single_file, config_only):
    folder, a = from_folder
    b = train(
        pretrained_model_name_or_path=single_file, single_file_config=config_only, train_data_dir=folder / "pictures",
        **FLAGS,
    )  # fmt: skip
    first, second = read_lora(a), read_lora(b)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [drawn(a, step) for step in (0, 2)] == [drawn(b, step) for step in (0, 2)]


@pytest.mark.parametrize("score", [torch.tensor(1.0), np.float64(0.1)], ids=["tensor", "numpy"])
def test_a_lightning_checkpoint_loads(tiny_sd, single_file, config_only, tmp_path, score):
    path = lightning_checkpoint(tmp_path / "old.ckpt", load_file(single_file), score)
    assert LIGHTNING.encode() in path.read_bytes()
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint"):
        torch.load(path, weights_only=True)
    _, (text_encoder,), vae, unet, scheduler_config = load(path, single_file_config=str(config_only))
    _, (text_encoder_2,), vae_2, unet_2, scheduler_config_2 = load(tiny_sd)
    assert same_weights(text_encoder, text_encoder_2)
    assert same_weights(vae, vae_2)
    assert same_weights(unet, unet_2)
    assert scheduler_config["_class_name"] == scheduler_config_2["_class_name"]
    # The stand-ins for missing modules exist only while the file is loaded.
    assert LIGHTNING not in sys.modules
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("as_vae", [False, True])
def test_a_checkpoint_that_runs_code_is_refused(tiny_sd, single_file, config_only, tmp_path, as_vae):
    target = tmp_path / "executed"
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": load_file(single_file), "callbacks": Attack(str(target))}, path)
    options = dict(name=tiny_sd, pretrained_vae=str(path)) if as_vae else dict(name=path)
    with pytest.raises(InputError, match=r"evil\.ckpt: .* could run code") as error:
        load(**options, single_file_config=str(config_only))
    assert "\n" not in str(error.value)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.is_dir()  # so the attack would work


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_a_folder_with_weights_that_run_code_is_refused(tiny_sd, tmp_path, name):
    target, folder = tmp_path / "executed", tmp_path / "evil"
    shutil.copytree(tiny_sd, folder)
    weights = folder / f"{name}.safetensors"
    pickled = folder / f"{name.replace('/model', '/pytorch_model')}.bin"
    torch.save(load_file(weights) | {"more": Attack(str(target))}, pickled)
    weights.unlink()
    with pytest.raises(InputError, match=r"evil: .* could run code") as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert not target.exists()
    torch.load(pickled, weights_only=False)
    assert target.is_dir()  # so the attack would work


@pytest.mark.parametrize(
    "what",
    ["lora", "no text encoder", "no unet", "cut", "empty", "unet weight", "vae weight", "text weight", "inpaint"],
)
def test_a_single_file_that_is_no_base_model_is_reported_in_one_line(single_file, config_only, tmp_path, what):
    path, tensors = tmp_path / f"{what}.safetensors", load_file(single_file)
    if what == "lora":
        save_file({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.ones(4, 8)}, path)
    elif what == "no text encoder":
        save_file({key: value for key, value in tensors.items() if not key.startswith("cond_stage")}, path)
    elif what == "no unet":
        save_file({key: value for key, value in tensors.items() if not key.startswith("model.diff")}, path)
    elif what.endswith("weight"):
        lost = {"unet": "attn1.to_q.weight", "vae": "encoder.mid.attn_1.q.weight", "text": "q_proj.weight"}
        tensors.pop(next(key for key in tensors if key.endswith(lost[what.split()[0]])))
        save_file(tensors, path)
    elif what == "inpaint":
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
        save_file(tensors, path)
    else:
        path.write_bytes(single_file.read_bytes()[: 10_000 if what == "cut" else 0])
    with pytest.raises(InputError, match=f"{what}.safetensors") as error:
        load(path, single_file_config=str(config_only))
    assert "\n" not in str(error.value)


def other_vae(folder, **changes):
    torch.manual_seed(5)
    options = dict(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    vae = AutoencoderKL(**options | changes)
    vae.save_pretrained(folder)
    return vae


@pytest.mark.parametrize(
    "component", ["unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"]
)
def test_a_truncated_file_of_a_folder_is_reported_in_one_line(tiny_sd, tmp_path, component):
    shutil.copytree(tiny_sd, tmp_path / "model")
    path = tmp_path / "model" / f"{component}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal_of(loading.find_base_model, str(tmp_path / "model"))
    assert message.startswith(f"{path}: it is damaged or incomplete (")


def test_another_vae_is_used(tiny_sd, from_folder, train, tmp_path):
    wanted = other_vae(tmp_path / "vae")
    assert same_weights(load(tiny_sd, pretrained_vae=str(tmp_path / "vae")).vae, wanted)
    folder, a = from_folder
    b = train(
        pretrained_vae_model_name_or_path=tmp_path / "vae", train_data_dir=folder / "pictures", **FLAGS,
    )  # fmt: skip
    first, second = read_lora(a), read_lora(b)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert drawn(a, 0) != drawn(b, 0)


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_another_vae_may_be_a_single_file(tiny_sd, single_file, config_only, tmp_path, prefix):
    tensors = {
        key.replace("first_stage_model.", prefix): value + 1
        for key, value in load_file(single_file).items()
        if key.startswith("first_stage_model.")
    }
    path = tmp_path / "vae.safetensors"
    save_file(tensors, path)
    wanted = {key: value + 1 for key, value in load(tiny_sd).vae.state_dict().items()}
    for base in (dict(name=tiny_sd), dict(name=single_file, single_file_config=str(config_only))):
        given = load(**base, pretrained_vae=str(path)).vae.state_dict()
        assert given.keys() == wanted.keys()
        assert all(torch.equal(given[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("changes", [dict(latent_channels=16), dict(block_out_channels=(8, 8))], ids=str)
def test_a_vae_whose_latents_do_not_fit_is_reported(tiny_sd, tmp_path, changes):
    count = len(changes.get("block_out_channels", (8, 8, 8)))
    changes |= dict(down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count)
    other_vae(tmp_path / "vae", **changes)
    with pytest.raises(InputError, match="do not fit") as error:
        load(tiny_sd, pretrained_vae=str(tmp_path / "vae"))
    assert str(tmp_path / "vae") in str(error.value)


def test_a_missing_vae_is_reported_by_its_name(tiny_sd):
    with pytest.raises(InputError, match="^/gone/vae: ") as error:
        load(tiny_sd, pretrained_vae="/gone/vae")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "lost"),
    [
        *((part, "file") for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")),
        *((part, "weight") for part in ("unet", "vae", "text_encoder")),
    ],
)
def test_an_incomplete_folder_is_reported(tiny_sd, tmp_path, part, lost):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    weights = list(folder.glob(f"{part}/*.safetensors"))
    if lost == "weight":
        tensors = load_file(weights[0])
        tensors.pop(next(key for key in tensors if "to_q" in key or "q_proj" in key))
        save_file(tensors, weights[0], metadata={"format": "pt"})
    else:
        for file in weights or folder.glob(f"{part}/*"):
            file.unlink()
    said = f"{folder}: this model can't be loaded"
    if part == "scheduler":
        said = f"{folder}/scheduler/scheduler_config.json: it can't be read"
    with pytest.raises(InputError, match=f"^{re.escape(said)}") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_explained_in_one_line(tiny_sd, tmp_path, capfd, damage):
    """Without the reports of the loaders before it."""
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    make, words = DAMAGES[damage]
    make(folder)
    capfd.readouterr()
    message = refusal_of(load, folder)
    assert str(folder) in message
    assert all(word in message for word in words), message
    assert message.endswith("ownload the model again.")
    assert "ignore_mismatched_sizes" not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_model_that_is_not_finite_is_refused(tiny_sd, tmp_path, part, value):
    shutil.copytree(tiny_sd, tmp_path / "model")
    (path,) = (tmp_path / "model").glob(f"{part}/*.safetensors")
    tensors = load_file(path)
    first, second = sorted(key for key in tensors if key.endswith("weight"))[:2]
    for name in (first, second):
        tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"this model can't be loaded: .* 2 of its tensors are not finite, the first: "
    ):
        load(tmp_path / "model")


def test_sdxl_under_another_name_is_reported(tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    xl = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16)
    path.write_text(json.dumps(json.loads(path.read_text()) | xl))
    with pytest.raises(InputError, match="its UNet is of Stable Diffusion XL, but model_index.json names"):
        load(tmp_path / "model")


def test_weights_identity_is_that_of_the_weights(tiny_sd, single_file, config_only, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "elsewhere")
    first, second = load(tiny_sd), load(tmp_path / "elsewhere")
    third = load(single_file, single_file_config=str(config_only))
    first, second, third = ((*loaded.text_encoders, loaded.vae, loaded.denoiser) for loaded in (first, second, third))
    for a, b, c in zip(first, second, third, strict=True):
        identity = weights_identity(a)
        assert identity == weights_identity(b) == weights_identity(c)
        parameter = list(b.parameters())[-1]
        parameter.data.view(-1)[-1] += 1e-6
        assert weights_identity(b) != identity
    assert len({weights_identity(model) for model in first}) == 3
    assert weights_identity(first[1].bfloat16()) != weights_identity(third[1])


def test_the_noise_schedule_is_the_base_models(tiny_sd):
    scheduler_config = load(tiny_sd).scheduler_config
    schedule = samplers.make_noise_scheduler(scheduler_config)
    assert type(schedule) is diffusers.DDPMScheduler
    assert schedule.config.prediction_type == "epsilon"
    assert (schedule.config.beta_start, schedule.config.beta_end) == (0.00085, 0.012)
    zero = samplers.make_noise_scheduler(scheduler_config, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    with pytest.raises(InputError, match="choose epsilon or v_prediction"):
        samplers.make_noise_scheduler({**scheduler_config, "prediction_type": "sample"})
    with pytest.raises(InputError, match="needs --prediction_type v_prediction"):
        samplers.make_noise_scheduler({**scheduler_config, "rescale_betas_zero_snr": True})
