"""What holds for all flags of the commands: paths begin at the home folder, and the command line wins over a recipe."""

import dataclasses
import os
from pathlib import Path

import pytest
from PIL import Image

import infer
import train_text_to_image_lora as training
from text_to_image_lora.command_line import user_path
from text_to_image_lora.errors import InputError


COMMANDS = {"training": training.build_parser, "infer": infer.build_parser}
PLACES = ("FOLDER", "FILE", "PATH", "MODEL")


def paths_of(command):
    """The flags of a command that take a path, by their names and placeholders."""
    for action in COMMANDS[command]()._actions:
        name = action.dest
        if name.endswith(("_dir", "_path")) or action.metavar in PLACES or name in ("lora", "dataset_name", "image"):
            yield name, action


@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_may_begin_at_the_home_folder(command, monkeypatch):
    """Shells expand neither --flag=~/x nor what is in a file."""
    monkeypatch.setenv("HOME", "/home/me")
    seen = {name for name, action in paths_of(command)}
    assert {"training": {"output_dir", "train_data_dir", "lora_weights"}, "infer": {"lora", "vae", "save_merged"}}[
        command
    ] <= seen
    for name, action in paths_of(command):
        if name in ("latent_cache_dir", "logging_dir"):  # the latter is always inside --output_dir
            continue
        assert str(COMMANDS[command]()._get_value(action, "~/x")) == "/home/me/x", name


def test_the_default_cache_is_recorded_without_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cache = training.CacheSettings(latent_cache_dir="~/x")
    assert cache.folder == Path("/home/me/x")
    assert user_path("owner/name") == "owner/name"
    assert user_path("a/~/x") == "a/~/x"


# --config


LEAST = ["--pretrained_model_name_or_path", "models/mini-sd"]
FOLDER = ["--train_data_dir", "metadata/weapons"]


@pytest.fixture
def settings(tmp_path):
    """Parses a command line with a recipe, and returns the values of its flags and the notes about them."""

    def parse(recipe, *words):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        given = training.parse_settings([*LEAST, "--config", str(path), *words])
        return given, [note.replace(f"{tmp_path}/", "") for note in given.notes]

    return parse


def value_of(settings, name):
    return next(
        getattr(getattr(settings, group.name), name)
        for group in dataclasses.fields(settings)
        if hasattr(getattr(settings, group.name), name)
    )


OVERRIDDEN = [  # (recipe, command line, the flag that is ignored, its value then)
    ("max_train_steps: 800", "--num_train_epochs 6", "max_train_steps", None),
    ("num_train_epochs: 6", "--max_train_steps 800", "num_train_epochs", 100),
    ("validation_data_dir: x", "--validation_split 0.1", "validation_data_dir", None),
    ("validation_split: 0.1", "--validation_data_dir x", "validation_split", 0.0),
    ("validation_steps: 250", "--validation_epochs 2", "validation_steps", None),
    ("validation_steps: 250", "--validation_epochs 0", "validation_steps", None),
    ("debiased_estimation: true", "--snr_gamma 5", "debiased_estimation", False),
    ("snr_gamma: 5", "--debiased_estimation", "snr_gamma", None),
    ("lr_scheduler: cosine\nlr_warmup_ratio: 0.1", "--lr_warmup_steps 0", "lr_warmup_ratio", None),
    ("lr_scheduler: cosine\nlr_warmup_steps: 10", "--lr_warmup_ratio 0.1", "lr_warmup_steps", None),
    ("use_8bit_adam: true", "--optimizer adamw", "use_8bit_adam", False),
    ("optimizer: adafactor", "--use_8bit_adam", "optimizer", None),
    ("lr_scheduler: cosine", "--optimizer schedulefree", "lr_scheduler", "constant"),
    ("learning_rate: 1e-4", "--optimizer prodigy", "learning_rate", None),
    ("loraplus_lr_ratio: 4", "--optimizer prodigy", "loraplus_lr_ratio", None),
    ("scale_lr: true", "--optimizer prodigy", "scale_lr", False),
    ("compile: blocks", "--perceptual_loss self", "compile", "off"),
    ("perceptual_loss: self", "--compile blocks", "perceptual_loss", None),
    ("enable_xformers_memory_efficient_attention: true", "--deterministic", "enable_xformers_memory_efficient_attention", False),
    ("train_text_encoder: true\ntext_encoder_rank: 2", "--no-train_text_encoder", "text_encoder_rank", None),
    ("train_text_encoder: true\ntext_encoder_lr: 2", "--no-train_text_encoder", "text_encoder_lr", None),
    ("output_kohya_format: true\nkohya_extras: tags", "--no-output_kohya_format", "kohya_extras", ()),
    ("aspect_ratio_buckets: true\nbucket_step: 8", "--no-aspect_ratio_buckets", "bucket_step", None),
    ("report_to: all\ntrackio_space_id: me/x", "--report_to none", "trackio_space_id", None),
    ("validation_split: 0.1\nearly_stopping_patience: 3", "--validation_split 0", "early_stopping_patience", None),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "words", "ignored", "value"), OVERRIDDEN)
def test_the_command_line_overrides_a_flag_in_the_recipe_that_conflicts_with_it(
    settings, recipe, words, ignored, value
):
    given, notes = settings(recipe, *FOLDER, *words.split())
    assert value_of(given, ignored) == value
    flag = words.split()[0].replace("--no-", "--")
    assert notes == [f"recipe.yaml: '{ignored}' is ignored, because {flag} on the command line overrides it"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("max_train_steps: 800", ""),
        ("max_train_steps: 800\nnum_train_epochs: 6", ""),
        ("max_train_steps: 800", "--max_train_steps 5 --num_train_epochs 6"),
        ("snr_gamma: 5", "--no-debiased_estimation"),
        ("validation_data_dir: x", "--validation_split 0"),
        ("compile: blocks", "--perceptual_loss decoder"),
        ("optimizer: prodigy", "--learning_rate 1"),
        ("lr_scheduler: cosine", "--optimizer adamw"),
        ("report_to: none", "--trackio_space_id me/x --report_to all"),
    ],
)
def test_what_does_not_conflict_stays(settings, recipe, words):
    assert settings(recipe, *FOLDER, *words.split())[1] == []


@pytest.mark.parametrize(
    ("recipe", "words", "ignored"),
    [
        ("dataset_name: owner/name\ncaption_column: en_text", FOLDER, ["caption_column", "dataset_name"]),
        ("train_data_dir: x\ncaption_column: en_text", ["--dataset_name", "owner/name"], ["train_data_dir"]),
        ("train_data_dir: x\ncaption_column: en_text", FOLDER, []),
        ("dataset_name: owner/name\ncaption_column: a", [*FOLDER, "--caption_column", "b"], ["dataset_name"]),
    ],
)
def test_the_pictures_of_the_command_line_replace_those_of_the_recipe(settings, recipe, words, ignored):
    given, notes = settings(recipe, *words)
    assert [note.split("'")[1] for note in notes] == ignored
    assert (given.data.dataset_name is None) == ("--train_data_dir" in words)


@pytest.mark.parametrize("words", [
    "--validation_split 0.1 --validation_data_dir x",
    "--snr_gamma 5 --debiased_estimation",
    "--lr_warmup_steps 0 --lr_warmup_ratio 0.1",
    "--use_8bit_adam --optimizer adafactor",
    "--optimizer schedulefree --lr_scheduler cosine",
    "--optimizer prodigy --loraplus_lr_ratio 4",
    "--optimizer prodigy --scale_lr",
    "--perceptual_loss self --compile blocks",
    "--deterministic --enable_xformers_memory_efficient_attention",
    "--text_encoder_rank 3",
    "--text_encoder_lr 3",
    "--kohya_extras tags",
    "--bucket_step 8",
    "--bucket_no_upscale",
    "--report_to none --trackio_space_id me/x",
    "--early_stopping_patience 3",
    "--early_stopping_patience 3 --validation_split 0.1 --validation_epochs 0",
    "--dataset_name x",
])  # fmt: skip
def test_flags_that_exclude_each_other_are_refused_wherever_both_come_from(settings, tmp_path, words):
    names = [word[2:] for word in words.split() if word.startswith("--")]
    with pytest.raises(InputError) as caught:
        settings("seed: 0", *FOLDER, *words.split())
    assert "recipe.yaml" not in str(caught.value)
    lines = []
    for part in words.replace(" --", "\n--").splitlines():
        name, _, value = part[2:].partition(" ")
        lines.append(f"{name}: {value or 'true'}")
    with pytest.raises(InputError) as caught:
        settings("\n".join([*lines, "train_data_dir: metadata/weapons"]))
    message = str(caught.value)
    assert message.endswith(f" in {tmp_path}/recipe.yaml.)")
    assert all(f"--{name}" in message for name in names if f"--{name} " in message)


def test_a_refusal_names_the_recipe_as_the_source(settings, tmp_path):
    cases = {
        ("optimizer: prodigy", "--loraplus_lr_ratio 4"): "--optimizer is in",
        ("lora_weights: void.safetensors", ""): "--lora_weights is in",
        ("snr_gamma: 5\ndebiased_estimation: true", ""): "--snr_gamma and --debiased_estimation are in",
        ("init_lora_weights: orthogonal", "--rank 3"): "--init_lora_weights is in",
    }
    for (recipe, words), source in cases.items():
        with pytest.raises(InputError) as caught:
            settings(recipe, *FOLDER, *words.split())
        assert str(caught.value).endswith(f"({source} {tmp_path}/recipe.yaml.)")


LATER = {  # what is wrong in the recipe: the flag that the refusal names as its source
    "train_data_dir: nowhere": "--train_data_dir",
    "train_data_dir: empty": "--train_data_dir",
    "train_data_dir: uncaptioned": "--train_data_dir",
    "caption_column: story": "--caption_column",
    "resolution: 100": "--resolution",
    "pretrained_model_name_or_path: nowhere": "--pretrained_model_name_or_path",
    "clip_skip: 99": "--clip_skip",
    "validation_data_dir: nowhere": "--validation_data_dir",
    "lora_weights: nowhere.safetensors": "--lora_weights",
}


@pytest.mark.parametrize("recipe", LATER)
def test_a_refusal_of_inputs_names_the_recipe_as_the_source(recipe, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "uncaptioned").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "uncaptioned" / "a.png")
    (tmp_path / "recipe.yaml").write_text(recipe)
    name, _, value = recipe.partition(": ")
    with pytest.raises(InputError) as caught:
        train(config="recipe.yaml", **{name: None})
    assert str(caught.value).endswith(f" ({LATER[recipe]} is in recipe.yaml.)")
    with pytest.raises(InputError) as caught:
        train(**{name: value})
    assert "recipe.yaml" not in str(caught.value)


def test_a_refusal_of_what_the_command_line_says_does_not_name_the_recipe(train, tmp_path):
    (tmp_path / "recipe.yaml").write_text("train_data_dir: elsewhere\nskip_bad_images: true\nrank: 4")
    with pytest.raises(InputError) as caught:
        train(config=tmp_path / "recipe.yaml", train_data_dir=tmp_path / "nowhere")
    assert "recipe.yaml" not in str(caught.value)


def test_every_conflict_is_between_flags_of_the_command():
    parser = training.build_parser()
    names = {action.dest for action in parser._actions}
    assert len(parser.conflicts) > 15
    for conflict in parser.conflicts:
        assert {conflict.first, conflict.second} <= names


def test_a_run_says_once_what_the_command_line_overrides_and_how_long_it_is(train, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("max_train_steps: 800\nlr_warmup_ratio: 0.5\n")
    train(config=tmp_path / "recipe.yaml", max_train_steps=None, num_train_epochs=2, lr_warmup_steps=0)
    said = capsys.readouterr().out
    for flag in ("max_train_steps", "lr_warmup_ratio"):
        assert said.count(f"recipe.yaml: '{flag}' is ignored, because ") == 1
    assert "6 pictures, 3 steps an epoch, 6 steps (2 epochs); " in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_recipe_may_be_in_any_unicode(encoding, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("rank: 3\ntrigger_word: топор\n".encode(encoding))
    given = training.parse_settings([*LEAST, *FOLDER, "--config", str(tmp_path / "recipe.yaml")])
    assert (given.lora.rank, given.captions.trigger_word) == (3, "топор")


def test_a_recipe_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("trigger_word: топор".encode("koi8-r"))
    with pytest.raises(
        InputError, match=r"recipe.yaml: it can't be read \(it is not UTF-8 text: .* Save it again as UTF-8"
    ):
        training.parse_settings([*LEAST, *FOLDER, "--config", str(tmp_path / "recipe.yaml")])


BYTES = b"caf\xe9"  # in Latin-1


@pytest.mark.parametrize("flag", ["output_dir", "train_data_dir", "lora_weights", "latent_cache_dir", "trigger_word"])
def test_bytes_that_no_record_can_hold_are_refused(flag, arguments, tmp_path):
    """They are in the arguments as Python decodes them, and the refusal can be printed."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/" + BYTES)
    with pytest.raises(InputError) as caught:
        training.parse_settings(arguments(**{flag: name}))
    assert str(caught.value).startswith(f"--{flag} {tmp_path}/caf\\xe9: it has bytes that are not UTF-8")
    assert str(caught.value).encode()
    assert not Path(name).exists()
    (tmp_path / "café").mkdir()
    assert training.parse_settings(arguments(**{flag: tmp_path / "café"}))


def test_pictures_may_be_written_into_a_folder_whose_name_is_not_utf8(tiny_sd, tmp_path, capfd, caplog):
    """Also a sheet, which records the command. The name is printed with its bytes as numbers."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + BYTES)
    words = ["--pretrained_model_name_or_path", str(tiny_sd), "--prompt", "an axe", "--grid", "steps=1,2"]
    infer.main([*words, "--output_dir", folder])
    assert Image.open(f"{folder}/grid.png").text["command"].endswith("/caf\\xe9'")
    assert f"{tmp_path}/caf\\xe9/grid.png: the grid" in capfd.readouterr().out
    assert caplog.text.encode()
