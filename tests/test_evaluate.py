"""`scripts/evaluate.py`: its judges on pictures of known content, the command whole, and what it tells apart."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_pictures
from PIL import Image

from scripts import evaluate
from scripts.evaluation import judges
from scripts.evaluation import pictures as evaluation_pictures
from scripts.evaluation.judges import ClipAndDino, MiniSdJudge, preprocess
from scripts.mini_sd.drawings import draw_scene


BASE, WEAPONS, WEAPONS_TEST = (
    ROOT / "models" / "mini-sd",
    ROOT / "metadata" / "weapons",
    ROOT / "metadata" / "weapons_test",
)


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory):
    """A folder with a CLIP of one layer each and the tokenizer of the embedded base."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from scripts.mini_sd.model import write_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = CLIPModel(
        CLIPConfig(
            text_config=sizes | tokens | dict(vocab_size=len(tokenizer), max_position_embeddings=20),
            vision_config=sizes | dict(image_size=224, patch_size=56), projection_dim=16,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def dino_model(tmp_path_factory):
    """A folder with a DINOv2 of one layer, and how it takes pictures."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    ).save_pretrained(folder)
    how = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))
    return folder


@pytest.fixture
def clip_and_dino(clip_model, dino_model):
    judge = ClipAndDino(str(clip_model), str(dino_model))
    judge.load("cpu")
    return judge


def noise_picture(seed, size=(80, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


# The judges.


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_pictures_are_prepared_as_transformers_does(kind):
    """By the image processor of DINOv2's own configuration, of which CLIP's differs in its settings alone."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    how = judges.PREPROCESSING[kind]
    images = [noise_picture(0, (500, 300)), noise_picture(1, (230, 641))]
    wanted = BitImageProcessorPil(**how, resample=3)(images, return_tensors="np")["pixel_values"]
    got = preprocess(images, how).numpy()
    assert got.shape == wanted.shape == (2, 3, 224, 224)
    assert np.abs(got - wanted).max() < 1e-5


def test_the_form_in_which_clips_authors_published_how_it_takes_pictures(clip_model, tmp_path):
    """openai/clip-vit-large-patch14 has sides where later models have mappings."""
    folder = shutil.copytree(clip_model, tmp_path / "clip")
    published = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "size": 224,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    how = judges.find_vision_model("--clip_model", str(folder), "clip")
    wanted = judges.PREPROCESSING["clip"]
    images = [noise_picture(0, (500, 300))]
    np.testing.assert_array_equal(preprocess(images, how).numpy(), preprocess(images, wanted).numpy())


def test_clip_and_dino_see_what_transformers_does(clip_and_dino):
    import torch

    images, prompts = [noise_picture(0), noise_picture(1)], ["a red axe", "a blue house on a gray background"]
    seen = clip_and_dino.look(images, prompts, {"own": clip_and_dino.embed(images[:1])})
    clip, how = clip_and_dino.clip, clip_and_dino.preprocessing[0]
    tokens = clip_and_dino.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip(pixel_values=preprocess(images, how), **tokens)
    wanted = output.logits_per_image.diagonal() / clip.logit_scale.exp()
    np.testing.assert_allclose(seen.adherence, wanted.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(seen.embedded["CLIP-I"], axis=1), 1)
    assert seen.embedded["DINOv2"].shape == (2, 32)
    assert seen.presence["own"][0] == pytest.approx(1)
    assert seen.presence["own"][1] < 0.999


def test_a_prompt_longer_than_clip_reads_is_cut(clip_and_dino):
    seen = clip_and_dino.look([noise_picture(0)], ["a red axe " * 30], {})
    assert np.isfinite(seen.adherence).all()


@pytest.fixture(scope="module")
def mini_sd_judge():
    judge = MiniSdJudge()
    judge.load("cpu")
    return judge


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("an orange axe with pink blossoms", {"kind": "axe", "object": "orange", "blossoms": True}),
        ("a painting of a gray whip on a red background", {"kind": "whip", "object": "gray", "background": "red"}),
        ("brown house, white background", {"kind": "house", "object": "brown", "background": "white"}),
        ("an axe on a blue background", {"kind": "axe", "background": "blue"}),
    ],
)
def test_what_a_caption_says(mini_sd_judge, prompt, said):
    assert mini_sd_judge.said(prompt) == said


def test_the_embedded_bases_judge_sees_what_is_drawn(mini_sd_judge):
    rng = np.random.default_rng(0)
    scenes = [("red", "fish", "blue"), ("yellow", "house", "gray"), ("green", "axe", "white")]
    images = [draw_scene(kind, colour, background, 128, rng) for colour, kind, background in scenes]
    prompts = ["a red fish on a blue background", "a green house on a black background", "a green axe with blossoms"]
    seen = mini_sd_judge.look(images, prompts, {"axe": None, "weapons": None})
    np.testing.assert_allclose(seen.adherence, [1, 1 / 3, 2 / 3])
    assert {name: found.tolist() for name, found in seen.presence.items()} == {"blossoms": [0] * 3, "axe": [0, 0, 1]}
    blossomed = [Image.open(path) for path in sorted(WEAPONS_TEST.glob("axe_*.png"))]
    found = mini_sd_judge.look(blossomed, ["an axe with pink blossoms"] * len(blossomed), {}).presence["blossoms"]
    assert found.mean() > 0.8
    for name, embedded in mini_sd_judge.embed([images[0], images[0], images[1]]).items():
        assert embedded[0] @ embedded[1] == pytest.approx(1), name
        assert embedded[0] @ embedded[2] < 0.95, name


def test_the_embedded_bases_own_judge_is_found():
    assert isinstance(judges.make_judge(None, BASE, "", ""), MiniSdJudge)
    assert isinstance(judges.make_judge("mini-sd", "somewhere/else", "", ""), MiniSdJudge)


def test_other_things_are_no_weapons(mini_sd_judge):
    assert len(mini_sd_judge.other_prompts) == 8
    mini_sd_judge.check_prompts(mini_sd_judge.other_prompts)
    kinds = {mini_sd_judge.said(prompt)["kind"] for prompt in mini_sd_judge.other_prompts}
    assert not kinds & {"axe", "spear", "trident", "whip"}
    assert len(kinds) > 3


# The command.


def run_here(words):
    """Runs the command's `main` in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        evaluate.main(evaluate.build_parser().parse_args([*map(str, words)]))
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()


@pytest.fixture
def words(model, lora, clip_model, dino_model, tmp_path):
    """A tiny evaluation of two LoRAs; the second is at strength 0, which is the base."""
    shutil.copytree(lora, tmp_path / "runs" / "epoch-0002")
    captions = ["a red axe in sks style", "a blue fish in sks style", "a green house in sks style"]
    held_out = write_pictures(tmp_path / "held-out", 4, captions=captions, seed=1)
    trained = write_pictures(tmp_path / "trained", 5, captions=captions, seed=2)
    flags = {
        "pretrained_model_name_or_path": [model], "lora": [lora, f"{tmp_path / 'runs' / 'epoch-0002'}:0"],
        "validation_data_dir": [held_out], "train_data_dir": [trained], "trigger_word": ["in sks style"],
        "other_prompts": ["a cup", "a red spear"], "num_prompts": [2], "num_inference_steps": [2],
        "clip_model": [clip_model], "dino_model": [dino_model], "num_cpu_threads": [1], "batch_size": [9],
        "device": ["cpu"], "output_dir": [tmp_path / "out"],
    }  # fmt: skip

    def build(**changes):
        chosen = {name: value for name, value in (flags | changes).items() if value is not None}
        return [word for name, values in chosen.items() for word in (f"--{name}", *values)]

    return build


@pytest.mark.usefixtures("library_settings")
def test_an_evaluation_whole_and_again(words, tmp_path, capsys):
    run_here(words())
    said, out = capsys.readouterr().out, tmp_path / "out"
    assert "2 LoRAs and the base: 6 prompts x 3 seeds each, 4 held-out pictures" in said
    assert "2/3 axe: 18 pictures drawn, 0 were there" in said
    found = json.loads((out / "evaluation.json").read_text())
    scores = found["scores"]
    assert list(scores) == ["base", "axe", "epoch-0002", "held-out pictures"]
    names = {"CLIP-T", "CLIP-I", "DINOv2", "diversity", "set distance", "nearest", "memorised", "held-out loss"}
    assert {*scores["base"]} == names
    assert {*scores["axe"]} == names | {"drift"}
    assert scores["axe"]["drift"]["mean"] > 1e-5
    assert scores["axe"]["held-out loss"]["mean"] != pytest.approx(1, abs=1e-3)
    # At strength 0 a LoRA is the base, in every score.
    assert scores["epoch-0002"].pop("drift")["mean"] == pytest.approx(0, abs=1e-9)
    for name, value in scores["epoch-0002"].items():
        assert value["mean"] == pytest.approx(scores["base"][name]["mean"], abs=1e-6), name
    assert {*found["bleed"]["axe"]} == {"held-out", "other prompts"}
    markdown = (out / "evaluation.md").read_text()
    assert found["recommendation"]["words"] in markdown
    assert found["recommendation"]["words"] in said
    for name in ("likeness-drift.png", "pictures.png", "nearest.png"):
        assert f"]({name})" in markdown
        with Image.open(out / name) as sheet:
            assert min(sheet.size) > 300
    pictures = {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")}
    assert len(pictures) == 3 * 18

    cut = out / "pictures" / "axe" / "000-seed0.png"
    (before, again) = cut.read_bytes(), out / "pictures" / "axe" / "001-seed2.png"
    cut.write_bytes(before[:500])
    again.unlink()
    run_here(words())
    said = capsys.readouterr().out
    assert "2/3 axe: 2 pictures drawn, 16 were there" in said
    assert "3/3 epoch-0002: 0 pictures drawn, 18 were there" in said
    changed = {path for path in pictures if path.stat().st_mtime_ns != pictures[path]}
    assert changed == {cut, again}
    assert json.loads((out / "evaluation.json").read_text())["recommendation"] == found["recommendation"]

    run_here(words(lora=[words()[3]], guidance_scale=[3], train_data_dir=None))  # drawn otherwise: drawn anew
    assert "2/2 axe: 18 pictures drawn, 0 were there" in capsys.readouterr().out
    assert "nearest" not in json.loads((out / "evaluation.json").read_text())["scores"]["axe"]


@pytest.mark.usefixtures("library_settings")
def test_the_held_out_loss_is_the_training_scripts(train, tiny_sd, pictures, tmp_path, clip_model, dino_model):
    """Of the same run, seed and pictures, divided by --validation_split."""
    split = dict(validation_split=0.4, num_validation_images=0)
    out = train(**split, learning_rate=3e-2, center_crop=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = [row["validation/relative_loss"] for row in rows if "validation/relative_loss" in row][-1]
    run_here([
        "--pretrained_model_name_or_path", tiny_sd, "--lora", out, "--train_data_dir", pictures, "--validation_split",
        0.4, "--num_prompts", 1, "--num_inference_steps", 1, "--clip_model", clip_model, "--dino_model", dino_model,
        "--num_cpu_threads", 1, "--other_prompts", "a cup", "--output_dir", tmp_path / "evaluation", "--device", "cpu",
    ])  # fmt: skip
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["scores"]["out"]["held-out loss"]
    assert abs(wanted - 1) > 2e-3  # ten times the tolerance below
    assert found["mean"] == pytest.approx(wanted, abs=2e-4)


def command(words):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "evaluate.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": ["nowhere/*.safetensors"]}, "--lora nowhere/*.safetensors: no file or folder has such a name"),
        ({"lora": ["nowhere/run"]}, "--lora nowhere/run is no file or folder here"),
        ({"validation_data_dir": None}, "Pass one of --validation_data_dir and --validation_split"),
        ({"validation_data_dir": ["nowhere"]}, "nowhere: there is no such folder"),
        ({"validation_data_dir": None, "train_data_dir": None, "validation_split": [0.2]}, "add it"),
        ({"clip_model": ["nowhere/folder/deep"]}, "--clip_model"),
        ({"num_images": [2]}, "--num_images 2: it must be 3 or more"),
        ({"trigger_word": [" "]}, "--trigger_word is empty"),
        ({"judge": ["mini-sd"]}, "'a cup' names nothing that the embedded base's judges know"),
        ({"other_prompts": ["a cup --seed 3"]}, "options behind a prompt are for infer.py"),
        ({"resolution": [33]}, "--resolution 33: this model needs a multiple of"),
        ({"scheduler": ["dppm"]}, "Did you mean ddpm?"),
        ({"nmu_prompts": [2]}, "Did you mean --num_prompts?"),
    ],
)
def test_bad_input_is_one_line(words, changes, said, capsys):
    """By the command's own `main`, which prints it and ends with code 2 (see the next test)."""
    with pytest.raises(evaluate.InputError) as refused:
        run_here(words(**changes))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not capsys.readouterr().err


def test_bad_input_ends_with_code_2(words, dino_model):
    code, lines = command(words(clip_model=[dino_model]))
    assert code == 2
    assert lines == [f"evaluate.py: {dino_model}: it is a model of the type dinov2, and --clip_model takes clip."]


def test_one_lora_given_twice(words, lora):
    with pytest.raises(evaluate.InputError, match="names a LoRA twice"):
        run_here(words(lora=[lora, f"{lora}:0.5"]))


def test_one_held_out_picture_is_too_few(words, tmp_path):
    with pytest.raises(evaluate.InputError, match="There is 1 held-out picture"):
        run_here(words(validation_data_dir=[write_pictures(tmp_path / "one", 1, seed=3)]))


def test_help_needs_no_torch():
    code = "import sys; from scripts import evaluate; evaluate.build_parser().format_help()\n"
    code += "print(*[name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_checkpoints_lie_in_their_runs(tmp_path):
    from scripts.evaluation.report import runs_of

    class Given:
        def __init__(self, given):
            self.given = given

    loras = {
        "base": None,
        "1": Given("run/epoch-0001"),
        "2": Given("run/best"),
        "3": Given("run"),
        "4": Given("other"),
    }
    assert {label: str(run) for label, run in runs_of(loras).items()} == {
        "1": "run",
        "2": "run",
        "3": "run",
        "4": "other",
    }


def test_slashes_in_labels_make_no_folders(tmp_path):
    assert evaluation_pictures.picture_folder(tmp_path, "a/epoch-1").parent == tmp_path / "pictures"
