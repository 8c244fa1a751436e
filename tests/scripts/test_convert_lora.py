"""The real convert_lora.py: between all formats, smaller ranks, sums, and invalid input in one line."""

import errno
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, read_header
from original_weights import Attack
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_pipeline import (
    ADAPTERS,
    adapter,
    adapters_of,
    assert_close,
    assert_differs,
    encode,
    pipeline_with,
    predict,
    small_pipeline,
    trained,
    trained_models,
)

from scripts import convert_lora
from text_to_image_lora import log
from text_to_image_lora.errors import InputError, TrainingError
from text_to_image_lora.models import kohya, lora_file
from text_to_image_lora.models.lora_checks import check_lora
from text_to_image_lora.models.updates import factors, modules_of, relative_difference


pytestmark = pytest.mark.lora_file
HEADER = {"ss_sd_model_name": "mini", "ss_v2": "False", "modelspec.trigger_phrase": "sks", "ss_network_dim": "99"}
PRIVATE = {
    "ss_tag_frequency": '{"axes": {"sks": 3}}',
    "modelspec.thumbnail": "data:image/jpeg;base64,",
    "ss_dataset_dirs": "{}",
}


@pytest.fixture(scope="module")
def base():
    return small_pipeline()


def train(base, options, seed=None):
    """Returns the UNet and the text encoder with adapters; each seed gives them other weights."""
    models = trained_models(base, options)
    if seed is not None:
        torch.manual_seed(seed)
        for model in models.values():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.data = torch.randn(parameter.shape) / 3
    return models


@pytest.fixture
def ours(base, tmp_path):
    """Returns the folder of a run: UNet and text encoder at rank 4 with alpha 6."""
    lora_file.save_lora(tmp_path / "ours", adapters_of(train(base, {"lora_alpha": 6})), HEADER | PRIVATE)
    return tmp_path / "ours"


def convert(*words):
    convert_lora.main(convert_lora.parse_args([*map(str, words)]))


def updates_of(path):
    """Returns {(component, module): the complete update as a matrix} in float64."""
    found = {}
    for name, state_dict in lora_file.load_lora(path)[0].items():
        for module in modules_of(state_dict):
            a, b = factors(state_dict, module)
            found[name, module] = b @ a
    return found


def assert_equal_updates(path, wanted, tolerance=1e-6):
    got, wanted = updates_of(path), wanted if isinstance(wanted, dict) else updates_of(wanted)
    assert got.keys() == wanted.keys()
    for place, update in wanted.items():
        assert (got[place] - update).norm() <= tolerance * update.norm(), place


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("way", ["kohya", "peft"])
def test_there_and_back_again(base, tmp_path, way, options):
    first = lora_file.save_lora(tmp_path / "a.safetensors", adapters_of(train(base, options)), HEADER)
    between, back = tmp_path / {"kohya": "b.safetensors", "peft": "b"}[way], tmp_path / "c.safetensors"
    convert(first, between, "--to", way)
    convert(between, back, "--to", "diffusers")
    one, two = load_file(first), load_file(back)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    # Convert once more through the other formats.
    convert(between, tmp_path / "d", "--to", "peft")
    convert(tmp_path / "d", tmp_path / "e.safetensors", "--to", "kohya")
    assert_equal_updates(tmp_path / "e.safetensors", first)


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_true_alpha_comes_home(base, tmp_path, options):
    """Converts the file that training writes with kohya's names, with its own ranks and alphas."""
    models = train(base, options)
    lora_file.save_lora(tmp_path / "ours.safetensors", adapters_of(models), {})
    kohya.save_kohya(tmp_path / "kohya.safetensors", adapters_of(models), HEADER)
    convert(tmp_path / "kohya.safetensors", tmp_path / "home.safetensors", "--to", "diffusers")
    assert_equal_updates(tmp_path / "home.safetensors", tmp_path / "ours.safetensors")
    pipe = pipeline_with(base)
    pipe.load_lora_weights(tmp_path, weight_name="home.safetensors")
    assert_close(predict(pipe.unet), predict(models["unet"]))
    assert_close(encode(pipe.text_encoder), encode(models["text_encoder"]))


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_itself_reads_its_folders(base, tmp_path, options):
    models = train(base, options)
    kohya.save_kohya(tmp_path / "kohya.safetensors", adapters_of(models), HEADER)
    convert(tmp_path / "kohya.safetensors", tmp_path / "folder", "--to", "peft")
    pipe = pipeline_with(base)
    unet = PeftModel.from_pretrained(pipe.unet, tmp_path / "folder" / "unet")
    assert unet.peft_config["default"].base_model_name_or_path == "mini"
    assert_differs(predict(base.unet), predict(models["unet"]))
    assert_close(predict(unet.base_model), predict(models["unet"]))
    if hasattr(pipe.text_encoder, "text_model"):  # a level in the names of peft, and of transformers before 5.6
        text_encoder = PeftModel.from_pretrained(pipe.text_encoder, tmp_path / "folder" / "text_encoder")
        assert_close(encode(text_encoder.base_model), encode(models["text_encoder"]))


def test_the_unet_alone_is_a_folder_of_its_own(base, tmp_path):
    lora_file.save_lora(tmp_path, {"unet": adapter(trained(base.unet, ["to_q"]))}, {})
    convert(tmp_path, tmp_path / "peft", "--to", "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    PeftModel.from_pretrained(pipeline_with(base).unet, tmp_path / "peft")


def test_headers_say_what_the_file_is_now(ours, tmp_path):
    convert(ours, tmp_path / "axes.safetensors", "--to", "kohya", "--rank", 2)
    entries = read_header(tmp_path / "axes.safetensors")
    assert entries.items() >= {
        "ss_network_dim": "2", "ss_network_alpha": "2", "ss_network_module": "networks.lora", "ss_output_name": "axes",
        "modelspec.title": "axes", "modelspec.trigger_phrase": "sks", "ss_sd_model_name": "mini",
        "ss_base_model_version": "sd_v1",
    }.items()  # fmt: skip
    assert not entries.keys() & {*PRIVATE, "lora_adapter_metadata"}
    convert(tmp_path / "axes.safetensors", tmp_path / "again.safetensors", "--to", "diffusers")
    assert "modelspec.trigger_phrase" in read_header(tmp_path / "again.safetensors")


def test_a_smaller_rank_is_the_best_one_and_its_error_is_printed(ours, tmp_path, capsys):
    """Compares with the singular values of the complete matrices."""
    convert(ours, tmp_path / "small.safetensors", "--rank", 2)
    said = capsys.readouterr().out
    whole, small = updates_of(ours), updates_of(tmp_path / "small.safetensors")
    shares, lost = {}, 0.0
    for place, update in whole.items():
        values = torch.linalg.svdvals(update)
        assert torch.linalg.matrix_rank(small[place], rtol=1e-4) == 2
        error = (small[place] - update).norm().item()
        assert error == pytest.approx(values[2:].norm().item(), rel=1e-4)
        shares[".".join(place)], lost = error / update.norm().item(), lost + error**2
    overall = (lost / sum(update.square().sum().item() for update in whole.values())) ** 0.5
    worst = max(shares, key=shares.get)
    assert f"rank 2: {overall:.1%} of the update's norm is lost, at worst {shares[worst]:.1%} ({worst})" in said
    assert "64 modules, read back exactly" in said
    convert(ours, tmp_path / "same.safetensors", "--rank", 4)
    assert "rank 4: 0.0% of the update's norm is lost" in capsys.readouterr().out
    assert_equal_updates(tmp_path / "same.safetensors", ours)


def test_sums_are_exact_and_can_be_brought_to_a_smaller_rank(base, ours, tmp_path, capsys):
    other, third = tmp_path / "other.safetensors", tmp_path / "third"
    kohya.save_kohya(other, adapters_of(train(base, ADAPTERS["patterns"], seed=2)), {})
    lora_file.save_lora(third, {"unet": adapter(trained(base.unet, ["to_q"], lora_alpha=3))}, {})
    convert(f"{ours}:0.5", tmp_path / "sum.safetensors", "--merge", f"{other}:-2", third, "--to", "kohya")
    wanted = {}
    for path, strength in ((ours, 0.5), (other, -2), (third, 1)):
        for place, update in updates_of(path).items():
            wanted[place] = wanted.get(place, 0) + strength * update
    assert_equal_updates(tmp_path / "sum.safetensors", wanted)
    ranks = {len(value) for key, value in load_file(tmp_path / "sum.safetensors").items() if ".lora_down." in key}
    assert ranks == {6, 8, 10}  # 4 + 2, 4 + 4, 4 + 2 + 4
    entries = read_header(tmp_path / "sum.safetensors")
    assert (entries["modelspec.merged_from"], entries["ss_sd_model_name"]) == ("ours, other, third", "mini")
    assert "modelspec.trigger_phrase" not in entries
    capsys.readouterr()
    convert(tmp_path / "sum.safetensors", tmp_path / "smaller.safetensors", "--rank", 7)
    assert 0 < float(re.search(r"rank 7: ([\d.]+)%", capsys.readouterr().out)[1]) < 30
    convert(f"{ours}:0.25", tmp_path / "weak.safetensors", "--to", "diffusers")
    assert_equal_updates(tmp_path / "weak.safetensors", {k: v / 4 for k, v in updates_of(ours).items()})


@pytest.mark.parametrize("rank", [3, 8, 40])
def test_layers_that_are_narrower_than_the_rank(base, tmp_path, capsys, rank):
    """conv_out has 4 outputs, to_q of the narrow level 8 inputs: sums of high ranks have more ranks than that."""
    parts = []
    for seed in range(3):
        torch.manual_seed(seed)
        unet = trained(
            base.unet, ["conv_out", "to_q", "conv1"], rank_pattern={"conv_out": 30, "to_q": 30, "conv1": 60}
        )
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.data = torch.randn(parameter.shape)
        parts.append(lora_file.save_lora(tmp_path / f"{seed}.safetensors", {"unet": adapter(unet)}, {}))
    convert(parts[0], tmp_path / "whole.safetensors", "--merge", *parts[1:])
    for to in ("kohya", "diffusers", "peft"):
        out = tmp_path / (to if to == "peft" else f"{to}.safetensors")
        convert(parts[0], out, "--merge", *parts[1:], "--rank", rank, "--to", to)
        assert "module" in capsys.readouterr().out
        whole, small = updates_of(tmp_path / "whole.safetensors"), updates_of(out)
        assert small["unet", "conv_out"].shape[0] == 4
        for place, update in whole.items():
            lost = torch.linalg.svdvals(update)[rank:].norm().item()
            assert (small[place] - update).norm().item() == pytest.approx(
                lost, rel=1e-3, abs=1e-4 * update.norm().item()
            )
    ranks = {key: len(value) for key, value in load_file(tmp_path / "kohya.safetensors").items() if "lora_down" in key}
    assert ranks["lora_unet_conv_out.lora_down.weight"] == min(rank, 4)


@pytest.mark.parametrize("count", [1, 3])
def test_dora_on_some_layers_is_only_written_where_it_can_be_read(base, tmp_path, count):
    state_dict = lora_file.fold_scale(*adapter(trained(base.unet, ["to_q"], use_dora=True)))
    magnitudes = [key for key in state_dict if key.endswith("magnitude_vector")]
    partial = {key: value for key, value in state_dict.items() if key not in magnitudes[count:]}
    kohya.save_kohya(tmp_path / "some.safetensors", {"unet": (partial, None)}, {})
    before = sorted(tmp_path.iterdir())
    for to in ("diffusers", "peft"):
        with pytest.raises(InputError, match=f"{count} of the {len(magnitudes)} layers of unet have DoRA.*--to kohya"):
            convert(
                tmp_path / "some.safetensors", tmp_path / ("out" if to == "peft" else "out.safetensors"), "--to", to
            )
    assert sorted(tmp_path.iterdir()) == before
    convert(tmp_path / "some.safetensors", tmp_path / "again.safetensors", "--to", "kohya", "--rank", 2)
    again = lora_file.load_lora(tmp_path / "again.safetensors")[0]["unet"]
    assert {key for key in again if "magnitude" in key} == {*magnitudes[:count]}


TRAINED = {
    "pretrained_model_name_or_path": "base", "prediction_type": "v_prediction", "rescale_betas_zero_snr": "True",
    "long_prompts": "True", "num_chunks": "2", "clip_skip": "1", "pretrained_vae_model_name_or_path": "other/vae",
}  # fmt: skip
KEPT = TRAINED.items() - {("pretrained_model_name_or_path", "base")}


def write_part(base, path, header, seed=0):
    return lora_file.save_lora(path, adapters_of(train(base, {}, seed)), header)


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_a_sum_keeps_how_all_its_parts_were_trained(base, tmp_path, capsys, to):
    first = write_part(base, tmp_path / "a.safetensors", TRAINED)
    second = write_part(base, tmp_path / "b.safetensors", TRAINED | {"num_chunks": "3", "learning_rate": "1"}, seed=1)
    foreign = write_part(base, tmp_path / "c.safetensors", {"ss_network_dim": "4"}, seed=2)
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    convert(first, out, "--merge", second, foreign, "--to", to)
    header = read_header(out / "unet" / "adapter_model.safetensors" if to == "peft" else out)
    assert header.items() >= (KEPT - {("num_chunks", "2")}) | {("num_chunks", "3")}
    said = capsys.readouterr().out
    words = "v-prediction, zero terminal SNR, long prompts, 3 chunks per prompt, clip skip 1, the VAE other/vae"
    assert (f"The LoRA was trained with {words}. peft's format has no place" in said) == (to == "peft")


def test_a_single_lora_keeps_how_it_was_trained_through_all_formats(base, tmp_path):
    convert(write_part(base, tmp_path / "a.safetensors", TRAINED), tmp_path / "b", "--to", "peft")
    convert(tmp_path / "b", tmp_path / "c.safetensors", "--to", "kohya")
    convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", "--to", "diffusers")
    assert read_header(tmp_path / "d.safetensors").items() >= KEPT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "with prediction_type v_prediction, {b} with epsilon"),
        ({"rescale_betas_zero_snr": "False"}, "with rescale_betas_zero_snr True, {b} with False"),
        ({"clip_skip": None}, "with clip_skip 1, {b} with none"),
        (
            {"pretrained_vae_model_name_or_path": "a/vae"},
            "pretrained_vae_model_name_or_path other/vae, {b} with a/vae",
        ),
        (dict.fromkeys(TRAINED) | {"modelspec.prediction_type": "epsilon"}, "v_prediction, {b} with epsilon"),
    ],
)
def test_parts_that_were_trained_differently_are_not_added(base, tmp_path, changes, message):
    header = {key: value for key, value in (TRAINED | changes).items() if value is not None}
    first = write_part(base, tmp_path / "a.safetensors", TRAINED)
    second = write_part(base, tmp_path / "b.safetensors", header, seed=1)
    with pytest.raises(InputError, match=re.escape(message.format(b=second))):
        convert(first, tmp_path / "out.safetensors", "--merge", second)
    assert not (tmp_path / "out.safetensors").exists()


def test_parts_of_two_families_are_not_added(tmp_path):
    """Also where no layer of one has another shape in the other one: by their keys, their widths or their headers."""
    ones = {}

    def write(name, layer, width, header=None):
        parts = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(4, 2)}
        save_file(parts, tmp_path / f"{name}.safetensors", header)
        ones[name] = tmp_path / f"{name}.safetensors"

    down = "unet.down_blocks.1.attentions.0.transformer_blocks"
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    write("sd1", f"{down}.0.attn2.to_k", 768)
    write("sd2", f"{down}.0.attn2.to_v", 1024)
    write("xl", f"{down}.1.attn1.to_k", 640)
    write("self-attention of sd", f"{down.replace('down_blocks.1', 'down_blocks.0')}.0.attn1.to_k", 320)
    write("text of sd1", text, 768, {"ss_base_model_version": "sd_v1"})
    write("text of xl", text, 768, {"ss_base_model_version": "sdxl_base_v1-0"})
    write("text of xl too", text, 768, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    for one, other in (
        ("sd1", "sd2"),
        ("sd1", "xl"),
        ("sd2", "xl"),
        ("text of sd1", "text of xl"),
        ("sd1", "text of xl too"),
        ("self-attention of sd", "xl"),
        ("xl", "self-attention of sd"),
    ):
        with pytest.raises(InputError, match=r"Only LoRAs of the same family can be merged\."):
            convert(ones[one], tmp_path / "out.safetensors", "--merge", ones[other])
    convert(
        ones["text of xl"],
        tmp_path / "out.safetensors",
        "--merge",
        ones["text of xl too"],
        ones["xl"],
        "--to",
        "kohya",
    )
    assert {key.partition("_text")[0] for key in load_file(tmp_path / "out.safetensors") if "text" in key} == {
        "lora_te1"
    }


def test_float16_says_how_far_it_rounds(ours, tmp_path, capsys):
    for to, out in (("kohya", "a.safetensors"), ("diffusers", "b.safetensors"), ("peft", "c")):
        convert(ours, tmp_path / out, "--to", to, "--dtype", "float16")
        assert 0 < float(re.search(r"within (\S+) of each update", capsys.readouterr().out)[1]) < 1e-3
        file = tmp_path / out if to != "peft" else tmp_path / out / "unet" / "adapter_model.safetensors"
        assert {v.dtype for k, v in load_file(file).items() if not k.endswith("alpha")} == {torch.float16}
        assert_equal_updates(tmp_path / out, ours, tolerance=1e-3)


def test_what_float16_cannot_hold_is_an_error(base, tmp_path):
    """The update is below the smallest numbers of float16."""
    state_dict, config = adapter(trained(base.unet, ["to_q"]))
    tiny = {key: value * (1e-8 if ".lora_B." in key else 1) for key, value in state_dict.items()}
    lora_file.save_lora(tmp_path, {"unet": (tiny, config)}, {})
    with pytest.raises(TrainingError, match="8 of 8 modules are not read correctly by"):
        convert(tmp_path, tmp_path / "half.safetensors", "--to", "kohya", "--dtype", "float16")


def test_dora_can_be_converted_and_resized_but_not_added(base, ours, tmp_path, capsys):
    dora = tmp_path / "dora"
    lora_file.save_lora(dora, adapters_of(train(base, ADAPTERS["dora"])), {})
    convert(dora, tmp_path / "small.safetensors", "--rank", 2, "--to", "kohya")
    assert "DoRA: the loss above does not take into account the base weights" in capsys.readouterr().out
    assert read_header(tmp_path / "small.safetensors")["ss_network_module"] == "lycoris.kohya"
    one, two = (lora_file.load_lora(path)[0]["unet"] for path in (dora, tmp_path / "small.safetensors"))
    magnitudes = [key for key in one if "magnitude" in key]
    assert len(magnitudes) == 52
    assert all(torch.equal(one[key], two[key]) for key in magnitudes)
    for words in ((f"{dora}:0.5", tmp_path / "x.safetensors"), (ours, tmp_path / "x.safetensors", "--merge", dora)):
        with pytest.raises(InputError, match="DoRA's update depends on the weights of the base model"):
            convert(*words)


def test_equal_and_different_updates_are_distinguished():
    """The factors cancel to seven digits; compares with matrices computed in float64."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 30, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    for a2, b2 in (
        (a, b),
        (a * 2, b / 2),
        (a, b * (1 + 1e-7)),
        (torch.randn(6, 30).double(), torch.randn(20, 6).double()),
    ):
        wanted = ((b @ a - b2 @ a2).norm() / (b @ a).norm()).item()
        assert relative_difference((a, b), (a2, b2)) == pytest.approx(wanted, rel=1e-3, abs=1e-14)
    zero = torch.zeros_like(b)
    assert relative_difference((a, zero), (a * 2, zero)) == 0
    assert relative_difference((a, zero), (a, b)) == np.inf


BAD = {
    "no such file": ("{tmp}/void {tmp}/o.safetensors", "{tmp}/void: there is no such file or folder."),
    "none to merge": ("{ours} {tmp}/o.safetensors --merge {tmp}/void:0.5", "{tmp}/void: there is no such file"),
    "not a number": (
        "{ours}:nan {tmp}/o.safetensors",
        "a strength is a number from -1000 to 1000, such as {ours}:0.8.",
    ),
    "a huge strength": ("{ours}:1e30 {tmp}/o.safetensors", "a strength is a number from -1000 to 1000"),
    "a huge strength to merge": (
        "{ours} {tmp}/o.safetensors --merge {ours}:-1e38",
        "a strength is a number from -1000",
    ),
    "infinite": ("{tmp}/large.safetensors:1000 {tmp}/o.safetensors", "in float32, 1 of its tensors is not finite"),
    "infinite, then a smaller rank": ("{tmp}/large.safetensors:1e3 {tmp}/o.safetensors --rank 1", "in float32, 1 of"),
    "infinite in float16": (
        "{tmp}/large.safetensors {tmp}/o.safetensors --dtype float16",
        "Pass smaller strengths, or --dtype float32.",
    ),
    "there already": ("{ours} {ours} --to peft", "{ours}: it exists already. Name another OUT"),
    "a folder for a file": ("{ours} {tmp}/o", "{tmp}/o: name a .safetensors file, or pass --to peft"),
    "a file for a folder": ("{ours} {tmp}/o.safetensors --to peft", "peft's format is a folder"),
    "another format": ("{ours} {tmp}/o.safetensors --to lycoris", "invalid choice: 'lycoris'"),
    "rank 0": ("{ours} {tmp}/o.safetensors --rank 0", "--rank 0: it must be 1 or more."),
    "a typo": ("{ours} {tmp}/o.safetensors --ranks 2", "there is no flag --ranks. Did you mean --rank?"),
    "truncated": (
        "{tmp}/cut.safetensors {tmp}/o.safetensors",
        "{tmp}/cut.safetensors: it can't be read as a safetensors",
    ),
    "a pickle": (
        "{tmp}/pickle.pt {tmp}/o.safetensors",
        "{tmp}/pickle.pt: it is not a LoRA of Stable Diffusion: it contains",
    ),
    "a pickle with code": (
        "{tmp}/evil.bin {tmp}/o.safetensors",
        "{tmp}/evil.bin: it carries more than weights (posix.mkdir)",
    ),
    "no pickle": ("{tmp}/text.pt {tmp}/o.safetensors", "{tmp}/text.pt: it is not a whole torch checkpoint"),
    "no adapter": (
        "{tmp}/model.safetensors {tmp}/o.safetensors",
        "not a LoRA of Stable Diffusion: it contains conv_in.weight",
    ),
    "of other shapes": ("{ours} {tmp}/o.safetensors --merge {tmp}/odd.safetensors", "they belong to different models"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_reported_in_one_line_and_nothing_is_written(ours, tmp_path, words, message):
    (tmp_path / "cut.safetensors").write_bytes((ours / lora_file.WEIGHTS_NAME).read_bytes()[:-100])
    torch.save({"x": torch.ones(1)}, tmp_path / "pickle.pt")
    torch.save({"x": Attack(str(tmp_path / "hacked"))}, tmp_path / "evil.bin")
    (tmp_path / "text.pt").write_text("a text")
    save_file({"conv_in.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    odd = {f"{name}.lora_A.weight": torch.ones(2, 5), f"{name}.lora_B.weight": torch.ones(5, 2)}
    save_file(odd, tmp_path / "odd.safetensors")
    large = {"lora_A": torch.ones(2, 5), "lora_B": torch.full((5, 2), 1e37)}
    save_file(
        {f"{name.replace('to_q', 'to_k')}.{key}.weight": value for key, value in large.items()},
        tmp_path / "large.safetensors",
    )
    before = sorted(tmp_path.rglob("*"))
    places = dict(tmp=tmp_path, ours=ours)
    with pytest.raises(InputError, match=re.escape(message.format(**places))) as caught:
        convert(*words.format(**places).split())
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["axe.pt", "axe.bin", "AXE.CKPT"])
def test_a_pickled_lora_can_be_converted(ours, tmp_path, name):
    tensors = load_file(ours / lora_file.WEIGHTS_NAME)
    torch.save({"state_dict": tensors, "epoch": 3} if name == "AXE.CKPT" else tensors, tmp_path / name)
    convert(tmp_path / name, tmp_path / "out.safetensors")
    assert_equal_updates(tmp_path / "out.safetensors", ours)
    with pytest.raises(InputError, match=r"Convert it: python scripts/convert_lora\.py IN OUT\.safetensors"):
        check_lora(tmp_path / name)


def run(*words):
    return subprocess.run(
        [sys.executable, "scripts/convert_lora.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_as_typed(ours, tmp_path):
    done = run(ours, tmp_path / "axes.safetensors", "--to", "kohya")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/axes.safetensors (kohya format): 64 modules, read back exactly\n"
    assert_equal_updates(tmp_path / "axes.safetensors", ours)
    done = run(ours, tmp_path / "axes.safetensors", "--to", "kohya")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"convert_lora.py: {tmp_path}/axes.safetensors: it exists already.")


def test_help_imports_nothing_heavy():
    code = "import sys; from scripts import convert_lora; convert_lora.parse_args(['a', 'b'])\n"
    code += "print(*[name for name in ('torch', 'numpy', 'peft', 'safetensors') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert "--merge LORA" in run("--help").stdout


def in_read_back(monkeypatch, out, change):
    """Calls `change(components)` when the written LoRA is read back, and asserts then that it is not at `out` yet."""
    read, paths = lora_file.load_lora, []

    def load(path):
        components, header = read(path)
        if Path(path).name == out.name:
            assert not out.exists()
            paths.append(path)
            change(components)
        return components, header

    monkeypatch.setattr(lora_file, "load_lora", load)
    return paths


@pytest.fixture(params=["diffusers", "kohya", "peft"])
def target(request, tmp_path):
    """Returns a path to write, in a folder of its own, and its format."""
    (tmp_path / "written").mkdir()
    return tmp_path / "written" / ("folder" if request.param == "peft" else "out.safetensors"), request.param


def test_what_can_not_be_read_back_is_never_put_in_place(ours, monkeypatch, target):
    out, dialect = target

    def damage(components):  # the disk returns other weights than were written
        for state_dict in components.values():
            for value in state_dict.values():
                value *= 1.5

    paths = in_read_back(monkeypatch, out, damage)
    with pytest.raises(TrainingError, match=f"^{re.escape(str(out))}: an update .* differs by"):
        convert(ours, out, "--to", dialect)
    assert len(paths) == 1
    assert list(out.parent.iterdir()) == []


def test_a_full_disk_is_reported_by_the_name_that_was_passed(ours, monkeypatch, target):
    out, dialect = target
    monkeypatch.setattr("os.fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(TrainingError, match=rf"^{re.escape(str(out))}\S*: it can't be written \(No space left"):
        convert(ours, out, "--to", dialect)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_another_process_wrote_meanwhile_stays(ours, monkeypatch, target, interrupted):
    out, dialect = target
    file = out / "adapter_model.safetensors" if dialect == "peft" else out

    def finish_first(components):
        file.parent.mkdir(exist_ok=True)
        file.write_text("the other's")
        if interrupted:
            raise KeyboardInterrupt

    in_read_back(monkeypatch, out, finish_first)
    with pytest.raises(KeyboardInterrupt if interrupted else InputError) as caught:
        convert(ours, out, "--to", dialect)
    if not interrupted:
        assert str(caught.value).startswith(f"{out}: another process has just written it. Name another OUT")
    assert list(out.parent.iterdir()) == [out]
    assert file.read_text() == "the other's"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_it_writes_leaves_nothing_behind(ours, tmp_path, name, code):
    (tmp_path / "written").mkdir()
    words = ["convert_lora.py", str(ours), str(tmp_path / "written" / "out.safetensors")]
    program = f"import os, runpy, signal, sys; sys.argv = {words}; number = signal.{name}\n"
    program += "signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)\n"
    program += "os.fsync = lambda handle: signal.raise_signal(number)\n"
    program += "runpy.run_path('scripts/convert_lora.py', run_name='__main__')\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, f"\nconvert_lora.py: stopped by {name}\n")
    assert list((tmp_path / "written").iterdir()) == []


def test_the_newest_lora_of_a_run_that_is_not_finished_is_converted(ours, tmp_path, said):
    for name in ("checkpoint-2", "epoch-0003", "checkpoint-9"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("checkpoint-2", "checkpoint-9"):
        shutil.copy(
            ours / "pytorch_lora_weights.safetensors", tmp_path / "run" / name / "pytorch_lora_weights.safetensors"
        )
    log.PACKAGE.setLevel("INFO")
    convert(tmp_path / "run", tmp_path / "out.safetensors")
    assert_equal_updates(tmp_path / "out.safetensors", ours)
    assert [line for line in said if "the run has no final LoRA yet" in line and "checkpoint-9" in line]
    with pytest.raises(InputError, match="IN .* contains no pytorch_lora_weights.safetensors"):
        convert(tmp_path / "run" / "epoch-0003", tmp_path / "other.safetensors")
