"""The headers of LoRA files and of kohya's file, which programs that list LoRAs read, contain nothing private."""

import base64
import hashlib
import io
import json
import re
import shutil
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from conftest import read_header, train_script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from small_pipeline import adapter, small_pipeline, trained

from text_to_image_lora.errors import InputError, TrainingError
from text_to_image_lora.models import header, kohya, lora_file
from text_to_image_lora.models.families import STABLE_DIFFUSION, STABLE_DIFFUSION_2, STABLE_DIFFUSION_XL
from text_to_image_lora.models.updates import factors, modules_of, relative_difference


def files_below(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.safetensors") if path.name != "adapter.safetensors"
    )


def test_a_run_writes_both_formats_and_reads_them_back(train, tmp_path, capsys):
    out = train(
        output_kohya_format=True, kohya_extras=["tags", "thumbnail"], output_dir=tmp_path / "red axes", rank=4,
        lora_alpha=2, use_rslora=True, train_text_encoder=True, text_encoder_rank=2, trigger_word="sks", clip_skip=1,
        validation_prompt="a red axe", validation_split=0.2, learning_rate=1e-4, save_every_n_epochs=1, max_train_steps=4,
        checkpointing_steps=4,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert (
        f"36 of 36 LoRA modules read back correctly from the diffusers file and from the kohya file ({out}/red axes.safetensors)"
        in said
    )
    best = [path.name for path in (out / "best").glob("red*")]
    assert len(best) == 1
    assert re.fullmatch(r"red axes-step00000[1-4]\.safetensors", best[0])
    assert files_below(out) == sorted(
        [
            "red axes.safetensors", "pytorch_lora_weights.safetensors",
            *(f"{folder}/{name}" for folder in ("best", "checkpoint-4/best") for name in (best[0], lora_file.WEIGHTS_NAME)),
            *(f"checkpoint-4/{name}" for name in ("red axes-step000004.safetensors", lora_file.WEIGHTS_NAME)),
            *(f"epoch-0001/{name}" for name in ("red axes-step000003.safetensors", lora_file.WEIGHTS_NAME)),
        ]
    )  # fmt: skip
    ours, theirs = lora_file.load_lora(out)[0], lora_file.load_lora(out / "red axes.safetensors")[0]
    for name, state_dict in ours.items():
        assert modules_of(state_dict) == modules_of(theirs[name])
        for module in modules_of(state_dict):
            assert relative_difference(factors(state_dict, module), factors(theirs[name], module)) < 1e-6
    with safe_open(out / "red axes.safetensors", "pt") as file:
        alphas = {round(file.get_tensor(key).item(), 4) for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
    assert alphas == {4.0, round(2**0.5, 4)}  # 2/sqrt(4) * 4; 1/sqrt(2) * 2
    entries = read_header(out / "red axes.safetensors")
    assert entries.items() >= {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_network_module": "networks.lora", "ss_network_dim": "4",
        "ss_network_alpha": "2.0", "ss_network_args": "{}", "ss_output_name": "red axes", "ss_steps": "4", "ss_epoch": "1",
        "ss_sd_model_name": "model", "ss_num_train_images": "5", "ss_clip_skip": "2", "ss_seed": "0",
        "ss_resolution": "(32, 32)", "ss_learning_rate": "0.0001", "ss_text_encoder_lr": "0.0001", "ss_optimizer": "adamw",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": "red axes", "modelspec.resolution": "32x32",
        "modelspec.trigger_phrase": "sks", "modelspec.prediction_type": "epsilon", "modelspec.encoder_layer": "2",
        "modelspec.usage_hint": "Trained on model. Use sks in the prompt. Clip skip 2 in A1111.",
    }.items()  # fmt: skip
    began = datetime.fromisoformat(entries["modelspec.date"])
    assert 0 <= (datetime.now(UTC) - began).total_seconds() < 120
    assert int(entries["ss_training_started_at"]) == began.timestamp()
    private = {"ss_tag_frequency", "modelspec.thumbnail"}
    shared = {
        key: value for key, value in entries.items() if key.startswith(("ss_", "modelspec.")) and key not in private
    }
    own = read_header(out / lora_file.WEIGHTS_NAME)
    assert own.items() >= {key: value for key, value in shared.items() if key != "modelspec.hash_sha256"}.items()
    for path in files_below(out):
        extra = private & read_header(out / path).keys()
        assert extra == (
            private if path == "red axes.safetensors" else {"ss_tag_frequency"} if "step" in path else set()
        )
        assert str(tmp_path) not in str(read_header(out / path))
    assert json.loads(entries["ss_tag_frequency"])["red axes"]["sks"] == 5
    data = base64.b64decode(entries["modelspec.thumbnail"].removeprefix("data:image/jpeg;base64,"))
    shown = Image.open(io.BytesIO(data))
    assert (shown.format, shown.size) == ("JPEG", (32, 32))
    (drawn,) = (out / "validation" / "step-000004").glob("prompt-00-0.png")
    difference = np.asarray(shown.convert("RGB"), dtype=int) - np.asarray(Image.open(drawn), dtype=int)
    assert abs(difference).mean() < 30  # the difference caused by JPEG; other pictures differ by 80


def test_kohyas_file_is_hashed_as_its_readers_do(tmp_path):
    """sshs_model_hash covers the bytes after the header; the legacy hash covers 64 KiB after the first MiB."""
    state_dict, config = adapter(trained(small_pipeline().unet, ["to_q"], lora_alpha=2))
    key = next(iter(state_dict))
    state_dict |= {key: torch.randn(4, 100_000)}
    path = kohya.save_kohya(tmp_path / "a.safetensors", {"unet": (state_dict, config)}, {"ss_v2": "False", "x": "1"})
    data, entries = path.read_bytes(), read_header(path)
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert entries["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert entries["modelspec.hash_sha256"] == f"0x{entries['sshs_model_hash']}"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    lora_file.write_tensors(tmp_path / "b.safetensors", tensors, {"ss_v2": "True", "y": "2"})
    again = read_header(tmp_path / "b.safetensors")
    assert again["sshs_model_hash"] == entries["sshs_model_hash"]
    assert len(entries["sshs_legacy_hash"]) == len(again["sshs_legacy_hash"]) == 8
    assert entries["sshs_legacy_hash"] not in (again["sshs_legacy_hash"], hashlib.sha256(b"").hexdigest()[:8])


def test_the_same_run_gives_the_same_bytes_however_often_it_was_interrupted(train, tmp_path):
    flags = dict(output_kohya_format=True, checkpointing_steps=1, max_train_steps=2, validation_prompt="a red axe")
    out = train(kohya_extras=["thumbnail", "tags"], **flags)
    names = ["out.safetensors", lora_file.WEIGHTS_NAME]
    first = {name: (out / name).read_bytes() for name in names}
    train(kohya_extras=["thumbnail", "tags"], **flags)
    assert {name: (out / name).read_bytes() for name in names} == first
    shutil.rmtree(out / "checkpoint-2")
    for name in names:
        (out / name).unlink()
    train(kohya_extras=["thumbnail", "tags"], **flags)
    assert {name: (out / name).read_bytes() for name in names} == first
    # A thumbnail of a prompt that was never drawn is left out if it is requested after the run is finished.
    train(kohya_extras=["thumbnail"], **flags | {"validation_prompt": "a blue whip"})
    assert "modelspec.thumbnail" not in read_header(out / "out.safetensors")
    # The flag can also be added later, to a finished run.
    (out / "out.safetensors").unlink()
    train(**flags)
    assert read_header(out / "out.safetensors").keys() == read_header(out / lora_file.WEIGHTS_NAME).keys() - {
        "lora_adapter_metadata"
    }


def test_no_header_tells_a_folder(train, tiny_sd, pictures, tmp_path, monkeypatch):
    shutil.copytree(tiny_sd, tmp_path / "secret" / "model")
    shutil.move(pictures, tmp_path / "secret" / "pictures")
    monkeypatch.chdir(tmp_path)
    train(
        pretrained_model_name_or_path="secret/model", train_data_dir="./secret/pictures/", output_dir="secret/axes",
        latent_cache_dir="secret/cache", output_kohya_format=True,
    )  # fmt: skip
    for name in ("axes.safetensors", lora_file.WEIGHTS_NAME):
        entries = read_header(tmp_path / "secret" / "axes" / name)
        assert [key for key, value in entries.items() if "secret" in value or str(tmp_path) in value] == []
        assert (entries["ss_sd_model_name"], entries["train_data_dir"]) == ("model", "pictures")


def test_a_file_that_does_not_arrive_ends_the_run(train, monkeypatch):
    rule = kohya.kohya_tensors
    monkeypatch.setattr(
        kohya, "kohya_tensors", lambda *given: {k: v for k, v in rule(*given).items() if not k.endswith(".alpha")}
    )
    with pytest.raises(TrainingError, match=r"out\.safetensors: 30 of 30 modules are not read correctly by ComfyUI"):
        train(output_kohya_format=True, lora_alpha=1)


def test_dora_with_kohyas_names_is_declared_as_lycoris(train, capsys):
    out = train(output_kohya_format=True, use_dora=True)
    said = capsys.readouterr().out
    assert "--use_dora: A1111 divides DoRA's magnitudes" in said
    assert "30 of 30 LoRA modules read back correctly from the diffusers file and from the kohya file" in said
    entries = read_header(out / "out.safetensors")
    assert entries["ss_network_module"] == "lycoris.kohya"
    assert json.loads(entries["ss_network_args"]) == {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--kohya_extras tags", "--kohya_extras applies to the file in kohya's format: add --output_kohya_format."),
        ("--output_kohya_format --kohya_extras thumbnail", "requires sample pictures: add --validation_prompt."),
    ],
)
def test_extras_without_what_they_need_are_refused(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        train_script.parse_settings(
            [*["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"], *flags.split()]
        )


def test_the_name_is_the_folders(tmp_path):
    assert kohya.file_name(tmp_path / "axes/") == "axes.safetensors"
    assert kohya.file_name(tmp_path / "runs" / ".." / "axes", 500) == "axes-step000500.safetensors"
    # This entry is in our file only, because diffusers would interpret it.
    assert kohya.file_name(tmp_path / "pytorch_lora_weights") == "pytorch_lora_weights-kohya.safetensors"


OF_A_RUN = {"resolution": "768", "learning_rate": "0.0001", "pretrained_model_name_or_path": "owner/model"}


@pytest.mark.parametrize(
    ("family", "prediction_type", "architecture", "version"),
    [
        (STABLE_DIFFUSION, "epsilon", "stable-diffusion-v1/lora", "sd_v1"),
        (STABLE_DIFFUSION, "v_prediction", "stable-diffusion-v1/lora", "sd_v1_v"),
        (STABLE_DIFFUSION_2, "epsilon", "stable-diffusion-v2-512/lora", "sd_v2"),
        (STABLE_DIFFUSION_2, "v_prediction", "stable-diffusion-v2-768-v/lora", "sd_v2_v"),
        (STABLE_DIFFUSION_XL, "epsilon", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
        (STABLE_DIFFUSION_XL, "v_prediction", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    ],
)
def test_the_base_model_is_described_as_kohya_does(family, prediction_type, architecture, version):
    entries = header.header_for_readers(
        OF_A_RUN | {"prediction_type": prediction_type}, name="axes", started_at=None, step=10, steps_per_epoch=4,
        num_pictures=7, names=family.kohya,
    )  # fmt: skip
    assert (entries["modelspec.architecture"], entries["ss_base_model_version"]) == (architecture, version)
    assert (entries["ss_v2"], entries["ss_sd_model_name"]) == (str(family is STABLE_DIFFUSION_2), "owner/model")
    assert entries["modelspec.prediction_type"] == ("v" if prediction_type == "v_prediction" else "epsilon")
    assert ("uses v-prediction" in entries["modelspec.usage_hint"]) == (prediction_type == "v_prediction")
    assert "modelspec.date" not in entries  # the checkpoint of this run contains no date
    assert set(map(type, entries.values())) == {str}


@pytest.mark.parametrize("resolution", ["768", "512 640 768"])
def test_of_several_resolutions_the_largest_is_named(resolution):
    """A1111 shows one, and sample pictures are drawn at it."""
    entries = header.header_for_readers(
        OF_A_RUN | {"resolution": resolution}, name="axes", started_at=None, step=10, steps_per_epoch=4,
        num_pictures=7, names=STABLE_DIFFUSION.kohya,
    )  # fmt: skip
    assert (entries["ss_resolution"], entries["modelspec.resolution"]) == ("(768, 768)", "768x768")


def test_tags_are_counted_between_commas():
    counted = header.tag_frequency(["sks, Red axe, ", "sks,blue axe", "sks"], "axes")
    assert counted == '{"axes": {"sks": 3, "blue axe": 1, "red axe": 1}}'


def test_a_thumbnail_is_small_and_says_nothing_but_pixels(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("prompt", "a secret axe")
    Image.new("RGB", (768, 512), "red").save(tmp_path / "a.png", pnginfo=info)
    data = base64.b64decode(header.thumbnail(tmp_path / "a.png").partition(",")[2])
    shown = Image.open(io.BytesIO(data))
    assert shown.size == (256, 171)
    assert b"secret" not in data
    assert shown.getpixel((9, 9))[0] > 240


def test_a_run_starts_from_any_of_the_formats(train, tmp_path):
    """Rank and alpha may differ; like many peft folders, this one contains only the UNet."""
    from scripts import convert_lora

    first = train(output_kohya_format=True, lora_alpha=2, output_dir=tmp_path / "axes")
    convert_lora.main(convert_lora.parse_args([str(first), str(tmp_path / "peft"), "--to", "peft"]))
    wanted = lora_file.load_lora(first)[0]["unet"]
    for k, weights in enumerate((first / "axes.safetensors", tmp_path / "peft")):
        out = train(
            lora_weights=weights, rank=6, lora_alpha=9, learning_rate=1e-12, adam_weight_decay=0,
            output_dir=tmp_path / str(k),
        )  # fmt: skip
        got = lora_file.load_lora(out)[0]["unet"]
        assert modules_of(got) == modules_of(wanted)
        for module in modules_of(wanted):
            assert relative_difference(factors(wanted, module), factors(got, module)) < 1e-5


def test_a_file_to_start_from_is_looked_at_before_the_base_model(train, tmp_path, monkeypatch):
    def too_late(*names, **options):
        raise AssertionError("the base model was looked for first")

    monkeypatch.setattr("text_to_image_lora.models.loading.find_base_model", too_late)
    save_file({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    for name, message in (
        ("loha", "it is LoHa, which is not supported"),
        ("cut", "it can't be read as a safetensors file"),
    ):
        with pytest.raises(InputError, match=f"{name}.safetensors: {message}"):
            train(lora_weights=tmp_path / f"{name}.safetensors")
