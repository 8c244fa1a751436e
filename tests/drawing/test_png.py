"""PNG files contain their parameters, for other programs and for drawing them again."""

import json
import os
import re
import shutil

import pytest
import sd_parsers
from infer_fixtures import PROMPT, difference, draw
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import infer


pytestmark = pytest.mark.usefixtures("library_settings")


@pytest.fixture(scope="module")
def repeated(model, lora, tmp_path_factory):
    """Six pictures, drawn in batches of four and of two."""
    folder = tmp_path_factory.mktemp("repeated")
    flags = ["--lora", f"{lora}:0.7", "--grid", "prompt", "seed=3,4", "--scheduler", "euler_a", "--clip_skip", 1]
    draw(model, folder, *flags, "--negative_prompt", "dark, ключ", prompt=("a dog, «red»", f"{PROMPT} --n x", "a cat"))
    return folder


def test_a_picture_draws_itself_again(repeated, tmp_path, capsys):
    """The batch has its original size, so that the file is equal byte for byte, and so are its name and messages."""
    capsys.readouterr()
    for name in ("00-a-dog-red-seed4.png", f"01-{PROMPT.replace(' ', '-')}-seed3.png", "02-a-cat-seed4.png"):
        infer.main(["--from_png", str(repeated / name), "--output_dir", str(tmp_path / "out")])
        assert (tmp_path / "out" / name).read_bytes() == (repeated / name).read_bytes()
    assert capsys.readouterr().err == ""
    sizes = [json.loads(Image.open(path).text["repeat"])["batch"] for path in sorted(repeated.glob("*seed*"))]
    assert sizes == [[4, 0], [4, 1], [4, 2], [4, 3], [2, 0], [2, 1]]


def test_flags_change_what_a_picture_says(model, lora, repeated, tmp_path):
    name = "02-a-cat-seed4.png"
    infer.main(["--from_png", str(repeated / name), "--seed", "9", "--output_dir", str(tmp_path / "1")])
    ((path,),) = [[*(tmp_path / "1").iterdir()]]
    assert path.name == "00-a-cat-seed9.png"
    flags = ["--lora", f"{lora}:0.7", "--scheduler", "euler_a", "--clip_skip", 1, "--seed", 9]
    (alone,) = draw(model, tmp_path / "2", *flags, "--negative_prompt", "dark, ключ", prompt=["a cat"]).values()
    assert difference(Image.open(path), alone) == 0
    infer.main(["--from_png", str(repeated / name), "--grid", "guidance=2,5", "--output_dir", str(tmp_path / "3")])
    assert len([*(tmp_path / "3").iterdir()]) == 3
    infer.main(["--from_png", str(repeated / name), "--grid", "guidance=7.5", "--output_dir", str(tmp_path / "4")])
    assert [path.name for path in sorted((tmp_path / "4").iterdir())] == ["00-a-cat-seed4-guidance7.5.png", "grid.png"]


def with_chunks(picture, path, **chunks):
    info = PngInfo()
    for key, value in {**picture.text, **chunks}.items():
        info.add_text(key, value)
    picture.save(path, pnginfo=info)
    return path


def test_what_keeps_a_picture_from_being_drawn_again(repeated, write_lora, tmp_path, capsys):
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    repeat = json.loads(picture.text["repeat"])
    repeat["machine"] |= {"diffusers": "0.21.0", "device": "cuda NVIDIA T4"}
    repeat["flags"]["lora"] = [str(write_lora("other", **{"author": "another"}))]
    path = with_chunks(picture, tmp_path / "cat.png", repeat=json.dumps(repeat))
    infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "1")])
    lines = capsys.readouterr().err.splitlines()
    now = json.loads(picture.text["repeat"])["machine"]
    assert lines == [
        f"note: {path} was drawn with device cuda NVIDIA T4 (here {now['device']}), diffusers 0.21.0 "
        f"(here {now['diffusers']}): the picture may differ from it",
        f"note: --lora is not what {path} was drawn with (its SHA-256 differs): the picture will differ from it",
    ]


def test_pictures_that_do_not_say_how(model, repeated, tmp_path, capsys):
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    repeat = json.loads(picture.text["repeat"])
    repeat["flags"]["lora"] = [str(tmp_path / "gone.safetensors")]
    plain = PngInfo()
    plain.add_text("parameters", picture.text["parameters"])
    picture.save(tmp_path / "a1111.png", pnginfo=plain)
    (tmp_path / "text.png").write_text("no picture")
    cases = {
        repeated / "grid.png": "is a sheet of pictures, which was drawn by: infer.py --pretrained_model_name_or_path",
        tmp_path / "a1111.png": "only pictures that infer.py drew do",
        tmp_path / "text.png": "can't be read: it is not a picture",
        tmp_path / "none.png": "can't be read: No such file or directory",
        with_chunks(picture, tmp_path / "gone.png", repeat=json.dumps(repeat)): "gone.safetensors does not exist",
        with_chunks(picture, tmp_path / "odd.png", repeat='{"flags": 3}'): "only pictures that infer.py drew do",
    }
    for path, reason in cases.items():
        with pytest.raises(SystemExit) as stop:
            infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "out")])
        err = capsys.readouterr().err
        assert (stop.value.code, len(err.splitlines())) == (2, 1)
        assert reason in err


def test_the_number_of_threads_is_repeated(repeated, tmp_path, capsys):
    """The number of threads changes the last bits of a picture too."""
    import torch

    torch.set_num_threads(2)
    infer.main(["--from_png", str(repeated / "02-a-cat-seed3.png"), "--output_dir", str(tmp_path)])
    assert torch.get_num_threads() == 1
    assert capsys.readouterr().err == ""


def test_a_picture_chooses_no_folder(repeated, tmp_path):
    """A picture of unknown origin determines only what is drawn, and not where files are written."""
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    repeat = json.loads(picture.text["repeat"])
    repeat["flags"] |= {"output_dir": [str(tmp_path / "theirs")], "device": ["cuda"], "save_merged": ["x"]}
    path = with_chunks(picture, tmp_path / "cat.png", repeat=json.dumps(repeat))
    infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "own")])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cat.png", "own"]


def read_parameters(text):
    """Reads `parameters` like A1111, with the patterns of its modules/infotext_utils.py."""
    *lines, last = text.strip().split("\n")
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    if len(pair.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt, negative, done = [], [], False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            done, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if done else prompt).append(line)
    found = dict(pair.findall(last))
    size = re.fullmatch(r"(\d+)x(\d+)", found["Size"])
    unquoted = {k: json.loads(v) if v[:1] == '"' == v[-1:] else v for k, v in found.items()}
    return unquoted | {
        "Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative), "Size-1": size[1], "Size-2": size[2]
    }  # fmt: skip


def test_a1111_reads_the_parameters(repeated, lora):
    found = read_parameters(Image.open(repeated / "00-a-dog-red-seed3.png").text["parameters"])
    expected = {"Prompt": "a dog, «red»", "Negative prompt": "dark, ключ", "Steps": "2", "Sampler": "Euler a"}
    expected |= {"CFG scale": "7.5", "Seed": "3", "Size-1": "64", "Size-2": "64", "Model": "tiny", "Clip skip": "2"}
    assert found.items() >= {**expected, "Lora": "axe:0.7"}.items()


def test_another_library_reads_the_parameters(repeated):
    """sd-parsers reads the parameters of A1111 and of other programs."""
    path = repeated / "00-a-dog-red-seed3.png"
    found = sd_parsers.ParserManager().parse(path)
    assert found.generator == sd_parsers.data.Generators.AUTOMATIC1111
    assert [prompt.value for prompt in found.prompts] == ["a dog, «red»"]
    assert [prompt.value for prompt in found.negative_prompts] == ["dark, ключ"]
    (sampler,) = found.samplers
    assert (sampler.name, sampler.parameters["seed"], sampler.parameters["cfg_scale"]) == ("Euler a", "3", "7.5")
    assert [model.name for model in found.models] == ["tiny"]


def changed(picture, path, batch=None, **flags):
    """Writes a picture whose file records other flags, or another batch."""
    repeat = json.loads(picture.text["repeat"])
    repeat["flags"] |= {name: [value] for name, value in flags.items()}
    return with_chunks(picture, path, repeat=json.dumps(repeat | ({"batch": batch} if batch else {})))


@pytest.mark.parametrize("prompt", ["secret.txt", "no such file.txt", "/dev/zero.txt", "a dog --steps 900 --seed 5"])
def test_a_recorded_prompt_is_read_literally(repeated, tmp_path, monkeypatch, capsys, prompt):
    """It is not the name of a file, and is not followed by options."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("the secret")
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    path = changed(picture, tmp_path / "cat.png", prompt=prompt)
    infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "out")])
    (drawn,) = (tmp_path / "out").iterdir()
    assert Image.open(drawn).text["prompt"] == prompt
    assert Image.open(drawn).text["seed"] == picture.text["seed"]


RECORDED = {
    "a batch": (dict(batch=[1_000_000, 0]), "records a batch of 1,000,000 pictures; at most 1,024 are drawn"),
    "steps": (dict(num_inference_steps="1000000000"), "it must be a whole number from 1 to"),
    "a height": (dict(height="800000"), "it must be a whole number, a multiple of 8, from 8 to 16384"),
    "a width": (dict(width="80000000000"), "it must be a whole number, a multiple of 8, from 8 to 16384"),
    "a device": (dict(image="/dev/zero"), "is no regular file"),
    "a pipe": (dict(vae="pipe"), "is no regular file"),
    "a LoRA": (dict(lora="/dev/zero:1"), "is no regular file"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_what_a_picture_records_has_limits(repeated, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    changes, reason = RECORDED[case]
    path = changed(Image.open(repeated / "02-a-cat-seed3.png"), tmp_path / "cat.png", **changes)
    with pytest.raises(SystemExit) as stop:
        infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert (stop.value.code, len(err.splitlines())) == (2, 1)
    assert reason in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[" * 500_000, '{"flags":' * 100_000, '{"flags": {"seed": ' + "[" * 100_000])
def test_a_record_that_is_nested_without_end(repeated, tmp_path, capsys, text):
    path = with_chunks(Image.open(repeated / "02-a-cat-seed3.png"), tmp_path / "cat.png", repeat=text)
    with pytest.raises(SystemExit) as stop:
        infer.main(["--from_png", str(path)])
    assert stop.value.code == 2
    assert "only pictures that infer.py drew do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"batch": [4, 2]', '"batch": [Infinity, 0]'),
        ('"batch": [4, 2]', '"batch": [2, -1e999]'),
        ('"a cat"', '"a \\ud800 cat"'),
        ('"seed": ["3"]', '"seed": ["\\udfff"]'),
    ],
)
def test_values_that_json_can_hold_and_nothing_else_are_refused(repeated, tmp_path, capsys, before, after):
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    text = re.sub(r'"batch": \[\d+, \d+\]', '"batch": [4, 2]', picture.text["repeat"])
    assert before in text
    path = with_chunks(picture, tmp_path / "odd.png", repeat=text.replace(before, after))
    with pytest.raises(SystemExit) as stop:
        infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert "does not say how to draw it again" in line


def change_weights(folder):
    """Changes one byte in the middle of the weights of a model's folder."""
    path = folder / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def with_models(model, controlnet, photo, tmp_path_factory):
    """A base model, a VAE and a ControlNet, and a picture that was drawn with them."""
    folder = tmp_path_factory.mktemp("models")
    for name, source in {"base": model, "vae": f"{model}/vae", "control": controlnet}.items():
        shutil.copytree(source, folder / name)
    flags = ["--vae", folder / "vae", "--controlnet", folder / "control", "--control_image", photo]
    draw(folder / "base", folder / "out", *flags, prompt=["a cat"])
    return folder


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ("base/unet", "pretrained_model_name_or_path"),
        ("base/vae", "pretrained_model_name_or_path"),
        ("vae", "vae"),
        ("control", "controlnet"),
    ],
)
def test_a_model_that_changed_at_its_path_is_noticed(with_models, changed, flag, tmp_path, capsys):
    path = with_models / "out" / "00-a-cat-seed0.png"
    before = (with_models / changed / "diffusion_pytorch_model.safetensors").read_bytes()
    capsys.readouterr()
    change_weights(with_models / changed)
    try:
        infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "1")])
    finally:
        (with_models / changed / "diffusion_pytorch_model.safetensors").write_bytes(before)
    reason = f"--{flag} is not what {path} was drawn with (its files differ)"
    assert capsys.readouterr().err.splitlines() == [f"note: {reason}: the picture may differ from it"]


def test_models_that_are_as_they_were_are_not_warned_of(with_models, tmp_path, capsys):
    capsys.readouterr()
    path = with_models / "out" / "00-a-cat-seed0.png"
    infer.main(["--from_png", str(path), "--output_dir", str(tmp_path)])
    assert capsys.readouterr().err == ""
    recorded = json.loads(Image.open(path).text["repeat"])["identities"]
    assert recorded.keys() == {"pretrained_model_name_or_path", "vae", "controlnet"}


def test_older_pictures_record_no_models(repeated, tmp_path, capsys):
    """They are drawn again without a warning."""
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    repeat = json.loads(picture.text["repeat"])
    del repeat["identities"]
    path = with_chunks(picture, tmp_path / "old.png", repeat=json.dumps(repeat))
    infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("identities", [3, ["base"], "hash", None])
def test_damaged_identities_are_refused_in_one_line(repeated, identities, tmp_path, capsys):
    picture = Image.open(repeated / "02-a-cat-seed3.png")
    repeat = json.loads(picture.text["repeat"]) | {"identities": identities}
    path = with_chunks(picture, tmp_path / "odd.png", repeat=json.dumps(repeat))
    with pytest.raises(SystemExit):
        infer.main(["--from_png", str(path), "--output_dir", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not say how to draw it again" in line
