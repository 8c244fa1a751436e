"""The real command: its flags, its answers to invalid input, its output, and launchers."""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import (
    ROOT,
    TORCHRUN,
    read_lora,
    read_metrics,
    refusal_of,
    run_command,
    train_script,
    words_of_run,
    write_pictures,
)
from PIL import Image
from safetensors import safe_open

from text_to_image_lora.command_line import flag_values
from text_to_image_lora.errors import InputError
from text_to_image_lora.files import check_writable


# The 51 flags of diffusers' train_text_to_image_lora.py (0.39), each with a value as text and its meaning.
UPSTREAM_FLAGS = {
    "pretrained_model_name_or_path": ("owner/model", "owner/model"),
    "revision": ("main", "main"),
    "variant": ("fp16", "fp16"),
    "dataset_name": ("owner/data", "owner/data"),
    "dataset_config_name": ("default", "default"),
    "train_data_dir": ("pictures", ["pictures"]),
    "image_column": ("image", "image"),
    "caption_column": ("text", "text"),
    "validation_prompt": ("a red axe", "a red axe"),
    "num_validation_images": ("4", 4),
    "validation_epochs": ("1", 1),
    "max_train_samples": ("10", 10),
    "output_dir": ("out", "out"),
    "cache_dir": ("downloads", "downloads"),
    "seed": ("1337", 1337),
    "resolution": ("512", 512),
    "center_crop": (None, True),
    "random_flip": (None, True),
    "train_batch_size": ("1", 1),
    "num_train_epochs": ("100", 100),
    "max_train_steps": ("15000", 15000),
    "gradient_accumulation_steps": ("4", 4),
    "gradient_checkpointing": (None, True),
    "learning_rate": ("1e-04", 1e-4),
    "scale_lr": (None, True),
    "lr_scheduler": ("cosine", "cosine"),
    "lr_warmup_steps": ("0", 0),
    "snr_gamma": ("5", 5.0),
    "use_8bit_adam": (None, True),
    "allow_tf32": (None, True),
    "dataloader_num_workers": ("8", 8),
    "adam_beta1": ("0.9", 0.9),
    "adam_beta2": ("0.999", 0.999),
    "adam_weight_decay": ("1e-2", 1e-2),
    "adam_epsilon": ("1e-08", 1e-8),
    "max_grad_norm": ("1", 1.0),
    "push_to_hub": (None, True),
    "hub_token": ("hf_abc", "hf_abc"),
    "prediction_type": ("epsilon", "epsilon"),
    "hub_model_id": ("owner/lora", "owner/lora"),
    "logging_dir": ("logs", "logs"),
    "mixed_precision": ("fp16", "fp16"),
    "report_to": ("wandb", "wandb"),
    "local_rank": ("-1", -1),
    "checkpointing_steps": ("500", 500),
    "checkpoints_total_limit": ("2", 2),
    "resume_from_checkpoint": ("latest", "latest"),
    "enable_xformers_memory_efficient_attention": (None, True),
    "noise_offset": ("0", 0.0),
    "rank": ("4", 4),
    "image_interpolation_mode": ("lanczos", "lanczos"),
}
# Four further flags of diffusers' train_text_to_image_lora_sdxl.py.
UPSTREAM_FLAGS_OF_XL = {
    "pretrained_vae_model_name_or_path": ("madebyollin/sdxl-vae-fp16-fix", "madebyollin/sdxl-vae-fp16-fix"),
    "train_text_encoder": (None, True),
    "debug_loss": (None, True),
    "enable_npu_flash_attention": (None, True),
}
# Further values of flags with choices; "tensorboard" and "comet_ml" depend on the machine.
UPSTREAM_CHOICES = {
    "lr_scheduler": ["linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
    "mixed_precision": ["no", "bf16"],
    "prediction_type": ["v_prediction"],
    "image_interpolation_mode": ["nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming"],
    "report_to": ["tensorboard", "all"],
}
NEEDED = ["--pretrained_model_name_or_path=model", "--train_data_dir=pictures"]


def parse(*words):
    return train_script.parse_settings([*NEEDED, *map(str, words)])


def refused(*words):
    """Returns the error message for invalid flags, which has one line."""
    return refusal_of(parse, *words)


def test_upstream_has_51_flags():
    assert len(UPSTREAM_FLAGS) == 51


@pytest.mark.parametrize("name", UPSTREAM_FLAGS | UPSTREAM_FLAGS_OF_XL)
def test_flags_of_diffusers_are_taken_with_their_types(name):
    word, meaning = (UPSTREAM_FLAGS | UPSTREAM_FLAGS_OF_XL)[name]
    args = train_script.build_parser().parse_args([f"--{name}"] if word is None else [f"--{name}", word])
    assert getattr(args, name) == meaning
    assert type(getattr(args, name)) is type(meaning)


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in UPSTREAM_CHOICES.items() for v in values])
def test_choices_of_diffusers_are_taken(name, value):
    assert getattr(train_script.build_parser().parse_args([f"--{name}", value]), name) == value


def test_a_command_written_for_diffusers_runs(train, tmp_path):
    """A single command with every flag of diffusers' script that a local run on a CPU can have."""
    output_dir = train(
        image_column="image", caption_column="text", validation_prompt="a red axe", validation_epochs=1,
        max_train_samples=4, cache_dir=tmp_path / "downloads", center_crop=True, random_flip=True, num_train_epochs=1,
        gradient_accumulation_steps=2, gradient_checkpointing=True, scale_lr=True, lr_scheduler="cosine",
        lr_warmup_steps=0, snr_gamma=5.0, use_8bit_adam=True, allow_tf32=True, adam_beta1=0.9, adam_beta2=0.999,
        adam_weight_decay=1e-2, adam_epsilon=1e-8, max_grad_norm=1, prediction_type="epsilon", logging_dir="logs",
        mixed_precision="bf16", local_rank=-1, checkpointing_steps=1, checkpoints_total_limit=1, noise_offset=0.1,
        resume_from_checkpoint="latest", rank=4, image_interpolation_mode="bicubic", learning_rate=1e-4,
        max_train_steps=2,
    )  # fmt: skip
    assert [row["step"] for row in read_metrics(output_dir)] == [1, 2]
    # --scale_lr multiplies by 2 pictures and 2 accumulation steps; the cosine schedule is halfway.
    assert [row["lr"] for row in read_metrics(output_dir)] == pytest.approx([4e-4, 2e-4])
    assert read_lora(output_dir)


def test_an_unknown_flag_names_the_nearest():
    assert refused("--learning_rat", "1e-4") == "there is no flag --learning_rat. Did you mean --learning_rate?"
    assert "Did you mean --rank?" in refused("--rnak=4")
    assert refused("--xyzzy") == "there is no flag --xyzzy. See --help."


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--adam_beta1", "1.5"], "--adam_beta1 1.5: it must be at least 0 and less than 1."),
        (["--adam_beta2", "-0.1"], "--adam_beta2 -0.1: it must be at least 0 and less than 1."),
        (["--adam_weight_decay", "-1"], "--adam_weight_decay -1: it must be 0 or more and finite."),
        (["--adam_epsilon", "-1"], "--adam_epsilon -1: it must be 0 or more and finite."),
        (["--max_grad_norm", "inf"], "--max_grad_norm inf: it must be 0 or more and finite."),
        (["--learning_rate", "inf"], "--learning_rate inf: it must be more than 0 and finite."),
        (["--learning_rate", "0"], "--learning_rate 0: it must be more than 0 and finite."),
        (["--noise_offset", "nan"], "--noise_offset nan: it must be 0 or more and finite."),
        (["--seed", str(2**64)], f"--seed {2**64}: it must be from 0 to {2**63 - 1}."),
        (["--seed", "-1"], f"--seed -1: it must be from 0 to {2**63 - 1}."),
        (
            ["--lr_scheduler", "polynomial", "--learning_rate", "1e-8"],
            "--learning_rate 1e-08: --lr_scheduler polynomial ends at 1e-07",
        ),
        (["--lora_dropout", "1"], "--lora_dropout 1: it must be at least 0 and less than 1."),
        (["--lr_scheduler", "piecewise_constant"], "needs --lr_step_rules"),
        (["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:x,0.1"], "--lr_step_rules 1:x,0.1:"),
        (["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:10"], "--lr_step_rules 1:10:"),
        (["--init_lora_weights", "random"], "choose true, gaussian or orthogonal"),
        (["--validation_prompt", " "], "--validation_prompt is empty"),
        (["--validation_prompts", ""], "--validation_prompt is empty"),
        (["--validation_prompts", "an axe", " \n"], "--validation_prompt is empty"),
        (
            ["--validation_prompts", "--seed 3"],
            "--validation_prompts: there is no prompt before --seed. Write the prompt",
        ),
        (["--push_to_hub"], "HF_HUB_OFFLINE"),
    ],
)
def test_values_that_would_fail_later_are_refused_at_once(words, answer):
    assert answer in refused(*words)


def test_a_step_rule_is_taken():
    assert parse("--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:10,0.1:20,1e-2").schedule.lr_step_rules


@pytest.mark.parametrize(
    ("words", "value"), [(["512"], 512), (["768", "512", "640"], (512, 640, 768)), (["96", "64"], (64, 96))]
)
def test_resolutions_are_sorted_and_a_single_one_is_a_number(words, value, tmp_path):
    assert parse("--resolution", *words).sizes.resolution == value
    (tmp_path / "flags.yaml").write_text(f"resolution: [{', '.join(words)}]\n")
    assert parse("--config", str(tmp_path / "flags.yaml")).sizes.resolution == value
    overridden = parse("--config", str(tmp_path / "flags.yaml"), "--resolution", "128")
    assert overridden.sizes.resolution == 128


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["512", "768", "512"], "--resolution 512 768 512: it must be different numbers."),
        (["512", "0"], "--resolution 0: it must be from 1 to 16384."),
        (["512,768"], "--resolution 512,768: it must be a whole number, from 1 to 16384."),
        ([], "argument --resolution: expected at least one argument"),
    ],
)
def test_wrong_resolutions_are_refused(words, answer):
    assert refused("--resolution", *words) == answer


# run.yaml


def test_the_files_of_a_run_name_its_resolutions(train, tmp_path):
    """Where they expect one, it is the largest, at which sample pictures are drawn. A single one stays a number."""
    prompt = dict(validation_prompt="an axe", output_kohya_format=True)
    for name, given, recorded in (("several", [32, 24], [24, 32]), ("one", 32, 32)):
        out = train(resolution=given, output_dir=tmp_path / name, **prompt)
        assert yaml.safe_load((out / "run.yaml").read_text())["resolution"] == recorded
        about = json.loads((out / "about.json").read_text())
        assert about["settings"]["resolution"] == recorded
        words = "24 32" if name == "several" else "32"
        assert f"--resolution {words} " in about["command"]
        assert about["dataset"]["pictures"] == len(about["dataset"]["shown"]) == 6
        trained_at = "32x32, 24x24" if name == "several" else "32x32"
        assert {row["trained_at"] for row in about["dataset"]["shown"]} == {trained_at}
        assert f"| resolution | {words} |" in (out / "README.md").read_text()
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            header = file.metadata()
        assert header["resolution"] == words
        assert (header["ss_resolution"], header["modelspec.resolution"]) == ("(32, 32)", "32x32")
        assert header["ss_num_train_images"] == "6"
        with Image.open(out / "validation" / "step-000002" / "prompt-00-0.png") as drawn:
            assert drawn.size == (32, 32)


def test_run_yaml_gives_the_same_run_again(train, arguments, tmp_path):
    options = dict(
        rank=2, lora_alpha=3, center_crop=True, snr_gamma=5, seed=None, target_modules=["to_q", "to_k"], use_rslora=True,
        validation_prompt="a red axe: 'sharp' # 1", lr_scheduler="linear", init_lora_weights="true", max_train_steps=3,
        max_train_samples=3,
    )  # fmt: skip
    first = train(output_dir=tmp_path / "first", **options)
    wanted = train_script.parse_settings(arguments(output_dir=tmp_path / "first", **options))
    again = train_script.parse_settings([f"--config={first / 'run.yaml'}"])
    assert again.run.seed is not None  # a seed that was drawn at random is saved in run.yaml
    assert again.samples.texts == wanted.samples.texts == [options["validation_prompt"]]
    not_the_same = (
        "seed",
        "config",
        "validation_prompt",
        "validation_prompts",
    )  # run.yaml contains all prompts under the last flag
    again, wanted = (
        {k: v for k, v in flag_values(settings).items() if k not in not_the_same} for settings in (again, wanted)
    )
    assert again == wanted

    others = (
        "pretrained_model_name_or_path", "train_data_dir", "resolution", "train_batch_size", "learning_rate",
        "report_to", "latent_cache_dir", "validation_inference_steps", "num_validation_images", "max_train_steps", "seed",
    )  # fmt: skip
    second = train(config=first / "run.yaml", output_dir=tmp_path / "second", **dict.fromkeys(others))
    a, b = read_lora(first), read_lora(second)
    assert all(a[key].equal(b[key]) for key in a | b)


def test_run_yaml_leaves_open_what_follows_from_other_flags(train, tmp_path):
    """If the command line changes the rank, alpha changes with it, because its default depends on the rank."""
    out = train(output_dir=tmp_path / "out", lr_warmup_ratio=0.5, max_train_steps=None, num_train_epochs=1, rank=2)
    argv = ["--config", str(out / "run.yaml"), "--rank", "8", "--num_train_epochs", "3", "--optimizer", "prodigy"]
    settings = train_script.parse_settings([*argv, "--learning_rate", "1"])
    assert (settings.schedule.lr_warmup_steps, settings.schedule.lr_warmup_ratio) == (None, 0.5)
    assert (settings.lora.lora_alpha, settings.batches.max_train_steps, settings.batches.num_train_epochs) == (
        None,
        None,
        3,
    )
    assert (settings.sizes.bucket_step, settings.cache.cache_variations) == (None, None)
    assert settings.lora.alpha == 8
    num_steps = settings.batches.num_steps(10)
    assert (num_steps, settings.schedule.num_warmup_steps(num_steps)) == (30, 15)


# Bad input, through the real command.


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory):
    """Returns an environment in which torch cannot be imported, so that answers must be given before torch is imported."""
    folder = tmp_path_factory.mktemp("no-torch")
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    return {"PYTHONPATH": str(folder)}


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


BAD_INPUT = {
    "no data folder": (dict(train_data_dir="{tmp}/void"), "{tmp}/void: there is no such folder"),
    "empty folder": (dict(train_data_dir="{tmp}/empty"), "it contains no pictures and no metadata file"),
    "no captions": (dict(train_data_dir="{tmp}/bare"), "the pictures have no captions. Add a metadata.csv"),
    "caption column": (dict(caption_column="txet"), "there is no column 'txet' (--caption_column). The columns are:"),
    "image column": (dict(image_column="imgae"), "there is no column 'imgae'"),
    "unknown flag": (dict(rnak=4), "there is no flag --rnak. Did you mean --rank?"),
    "unknown choice": (dict(lr_scheduler="cosin"), "--lr_scheduler: invalid choice: 'cosin'"),
    "no number": (dict(rank="four"), "--rank four: it must be a whole number, 1 or more."),
    "resolution": (dict(resolution=36), "--resolution 36: this model needs a multiple of 8, e.g. 32"),
    "one of several": (dict(resolution=[32, 36]), "--resolution 36: this model needs a multiple of 8, e.g. 32"),
    "rank 0": (dict(rank=0), "--rank 0: it must be 1 or more."),
    "too large a split": (dict(validation_split=0.9), "--validation_split 0.9: it must be from 0 to 0.5."),
    "two ways to validate": (
        dict(validation_split=0.1, validation_data_dir="{tmp}"), "Pass one of --validation_split and --validation_data_dir"
    ),
    "nothing to judge by": (dict(early_stopping_patience=2), "--early_stopping_patience needs validation pictures"),
    "never judged": (
        dict(early_stopping_patience=2, validation_split=0.1, validation_epochs=0),
        "--early_stopping_patience needs validations",
    ),
    "validation folder": (dict(validation_data_dir="{tmp}/void"), "{tmp}/void: there is no such folder"),
    "no epochs": (dict(num_train_epochs=0), "--num_train_epochs 0: it must be 1 or more."),
    "file in the way": (dict(output_dir="{tmp}/file/out"), "--output_dir {tmp}/file/out: it must be a folder that can be made, but {tmp}/file is a file"),
    "file in the preview's way": (
        dict(preview_data="{tmp}/file/sheet.png"),
        "{tmp}/file: it can't be written (Not a directory). Pass another --preview_data.",
    ),
    "no base model": (dict(pretrained_model_name_or_path="{tmp}/void"), "{tmp}/void: there is no such folder or file"),
    "no base model flag": (dict(pretrained_model_name_or_path=None), "--pretrained_model_name_or_path is required"),
    "no LoRA": (dict(lora_weights="{tmp}/void"), "{tmp}/void: there is no such file or folder (--lora_weights)"),
    "pissa": (dict(init_lora_weights="pissa"), "It changes the base model, so the saved file would be wrong"),
    "two datasets": (dict(dataset_name="owner/data"), "Pass one of --dataset_name"),
    "no dataset": (dict(train_data_dir=None), "Pass one of --dataset_name"),
    "template": (dict(caption_template="{{name}}"), "--caption_template '{{name}}': it may contain {{trigger}} and {{class}}"),
    "template with a width": (dict(caption_template="{{trigger:>99999999999}}"), "but no other braces"),
    "template with an attribute": (dict(caption_template="{{trigger.__class__}}"), "but no other braces"),
    "template with an index": (dict(caption_template="{{trigger[0]}}"), "but no other braces"),
    "template with a conversion": (dict(caption_template="{{class!r}}"), "but no other braces"),
    "template with half a brace": (dict(caption_template="{{class"), "but no other braces"),
    "template with double braces": (dict(caption_template="{{{{class}}}}"), "but no other braces"),
    "template without a name": (dict(caption_template="{{}}"), "but no other braces"),
    "blank trigger": (dict(trigger_word="  "), "--trigger_word '  ': it must be a text that is not empty"),
    "blank column": (dict(caption_column=" "), "--caption_column ' ': it must be a text that is not empty"),
    "blank repository": (dict(hub_model_id=" "), "--hub_model_id ' ': it must be a text that is not empty"),
    "blank project": (dict(tracker_project_name=""), "--tracker_project_name '': it must be a text that is not empty"),
    "logs outside": (dict(logging_dir="../../../evil"), "--logging_dir ../../../evil: it must be a relative path"),
    "logs elsewhere": (dict(logging_dir="{tmp}/evil"), "--logging_dir {tmp}/evil: it must be a relative path"),
    "no instance prompt": (dict(instance_prompt=" "), "--instance_prompt is empty: write what the pictures show"),
    "instance layout": (dict(dataset_layout="instance"), "--dataset_layout instance requires --instance_prompt"),
    "config": (dict(config="{tmp}/file"), "{tmp}/file: it must hold one flag per line"),
}  # fmt: skip


# All cases run as the real command, but in one process, because imports take most of the time.
ANSWER_ALL = """
import contextlib, io, json, runpy, sys, time
from pathlib import Path

answers = {}
for case, words in json.load(sys.stdin).items():
    sys.argv = ["train_text_to_image_lora.py", *words]
    out, err, code, start = io.StringIO(), io.StringIO(), 0, time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path("train_text_to_image_lora.py", run_name="__main__")
        except SystemExit as end:
            code = end.code
    files = sorted(map(str, Path(FOLDER).rglob("*")))
    seconds = time.process_time() - start
    answers[case] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds, "files": files}
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tiny_sd, no_torch, tmp_path_factory):
    """Returns the answer to each case of `BAD_INPUT`, the folder of the case, and the previous content of the folder."""
    folder = tmp_path_factory.mktemp("bad input")
    pictures = write_pictures(folder / "pictures")
    (folder / "empty").mkdir()
    shutil.copytree(pictures, folder / "bare", ignore=shutil.ignore_patterns("*.jsonl"))
    (folder / "file").write_text("[]")
    words = {}
    for case, (changes, _) in BAD_INPUT.items():
        changes = {k: v.format(tmp=folder) if isinstance(v, str) else v for k, v in changes.items()}
        words[case] = [*map(str, words_of_run(tiny_sd, pictures, folder, **changes))]
    before = sorted(map(str, folder.rglob("*")))
    done = subprocess.run(
        [sys.executable, "-c", ANSWER_ALL.replace("FOLDER", repr(str(folder)))], input=json.dumps(words), text=True,
        capture_output=True, cwd=ROOT, env=os.environ | no_torch, check=True,
    )  # fmt: skip
    return json.loads(done.stdout), folder, before


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_answered_in_one_line_at_once(case, answers):
    answers, folder, before = answers
    given = answers[case]
    assert given["code"] == 2, given["err"]
    assert given["out"] == ""
    assert given["err"].startswith("train_text_to_image_lora.py: ")
    assert given["err"].count("\n") == 1
    assert BAD_INPUT[case][1].format(tmp=folder) in given["err"]
    assert given["seconds"] < 3
    assert given["files"] == before  # no output folder, no cache


def test_a_real_command_answers_bad_input_at_once(arguments, no_torch, pictures, tmp_path):
    (pictures / "metadata.jsonl").unlink()
    start = cpu_seconds()
    done = run_command(arguments(), env=no_torch)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train_text_to_image_lora.py: .*the pictures have no captions. .*\n", done.stderr)
    assert cpu_seconds() - start < 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", ["launcher", "flag"])
def test_fp16_without_a_gpu(train, tmp_path, monkeypatch, by):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    message = refusal_of(train, mixed_precision="fp16" if by == "flag" else None)
    assert message == ("--mixed_precision fp16 needs a GPU: on a CPU it would train in float32. Use bf16 or no.")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


LAUNCHES = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_that_divide_the_model_are_refused(arguments, no_torch, tmp_path, name):
    """Sets the environment of `accelerate launch --use_deepspeed` and `--use_fsdp`."""
    done = run_command(arguments(), env=no_torch | {LAUNCHES[name]: "true"})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"train_text_to_image_lora.py: {name} divides a model .*--multi_gpu .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == [tmp_path / "pictures"]


def test_a_launch_that_turns_them_off_trains(train, monkeypatch):
    for variable in LAUNCHES.values():
        monkeypatch.setenv(variable, "false")
    assert read_lora(train(max_train_steps=1))


def test_help_is_quick_and_needs_no_torch(no_torch):
    times = []
    for _ in range(2):
        start = cpu_seconds()
        done = run_command(["--help"], env=no_torch)
        times.append(cpu_seconds() - start)
    assert done.returncode == 0, done.stderr
    assert all(f"--{name}" in done.stdout for name in UPSTREAM_FLAGS)
    assert min(times) < 0.5


def test_a_broken_picture_stops_the_run_before_training(train, pictures, tmp_path):
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:100])
    message = refusal_of(train)
    assert f"{pictures}/metadata.jsonl:4: '3.png': it can't be decoded (" in message
    assert message.endswith("Fix it, or pass --skip_bad_images to leave it out.")
    assert not (tmp_path / "out").exists()


def test_skip_bad_images_leaves_them_out_by_name(train, pictures, tmp_path, capsys):
    (pictures / "3.png").write_bytes(b"")
    (pictures / "5.png").unlink()
    left = train(skip_bad_images=True, output_dir=tmp_path / "left")
    said = capsys.readouterr().out
    assert f"left out: {pictures}/metadata.jsonl:4: '3.png': the file is empty" in said
    assert f"left out: {pictures}/metadata.jsonl:6: '5.png' does not exist" in said
    assert "4 pictures, 2 steps an epoch" in said

    rows = (pictures / "metadata.jsonl").read_text().splitlines()
    (pictures / "metadata.jsonl").write_text("\n".join(rows[:3] + rows[4:5]))
    without = train(output_dir=tmp_path / "without")
    a, b = read_lora(left), read_lora(without)
    assert all(a[key].equal(b[key]) for key in a | b)


def test_not_one_usable_picture(train, pictures):
    for path in pictures.glob("*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"None of the pictures can be used"):
        train(skip_bad_images=True)


def test_the_output_folder_is_checked_by_all_processes_at_once(tmp_path):
    """A process must not delete files after its check that another process is about to use."""
    failures = []

    def check():
        try:
            for i in range(100):
                check_writable(tmp_path / f"{i}" / "deep" / "out", "--output_dir")
        except InputError as error:
            failures.append(error)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == []


# Launchers.


TWO_BY_ACCELERATE = (
    Path(sys.executable).with_name("accelerate"), "launch", "--config_file", "accelerate_config.yaml", "--multi_gpu",
    "--num_processes", "2",
)  # fmt: skip


def test_two_processes_answer_bad_input_once(arguments):
    done = run_command(arguments(rank=0), TWO_BY_ACCELERATE)
    assert done.returncode != 0
    assert done.stderr.count("train_text_to_image_lora.py: --rank 0: it must be 1 or more.") == 1


def test_a_slow_first_process_answers_too(arguments, tmp_path):
    """Another rank ends first, and the launcher then stops all other ranks immediately."""
    late = "import os, time\nif os.environ.get('LOCAL_RANK') == '0':\n    time.sleep(1)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    done = run_command(arguments(rank=0), TORCHRUN, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode != 0
    assert done.stderr.count("train_text_to_image_lora.py: --rank 0: it must be 1 or more.") == 1


@pytest.fixture(scope="module")
def real_run(tiny_sd, tmp_path_factory):
    """The command of the docstring with accelerate_config.yaml, on the tiny model, with W&B by default."""
    tmp_path = tmp_path_factory.mktemp("real")
    documented = shlex.split(train_script.__doc__.split("\n\n")[1])
    accelerate, script = documented.index("accelerate"), documented.index("train_text_to_image_lora.py")
    assert accelerate == 0
    launcher = [Path(sys.executable).with_name("accelerate"), *documented[1:script]]
    assert "accelerate_config.yaml" in launcher
    words = [
        *documented[script + 1 :], "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir",
        write_pictures(tmp_path / "pictures"), "--resolution", 32, "--max_train_steps", 3, "--train_batch_size", 2,
        "--seed", 0, "--output_dir", tmp_path / "out", "--latent_cache_dir", tmp_path / "cache",
        "--validation_prompt", "a red axe", "--validation_inference_steps", 2, "--num_validation_images", 1,
        "--hub_token=hf_never_to_be_seen", "--num_cpu_threads", 1,
    ]  # fmt: skip
    done = run_command(words, launcher)
    assert done.returncode == 0, done.stderr
    return done, tmp_path / "out"


def test_the_documented_command_trains(real_run):
    done, output_dir = real_run
    assert [row["step"] for row in read_metrics(output_dir)] == [1, 2, 3]
    assert any(value.any() for key, value in read_lora(output_dir).items() if "lora_B" in key)
    assert yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())["mixed_precision"] == "no"
    assert "in float32" in done.stdout


def test_a_run_says_only_what_is_its_own(real_run):
    done, output_dir = real_run
    starts = [
        "loading ",
        "--hub_token: a launcher that fails prints its command, including the token. `hf auth login`, or HF_TOKEN in",
        f"cache: 0.2 MiB in {output_dir.parent}/cache",
        "6 pictures, 3 steps an epoch, 3 steps (1 epoch); effective batch 2 on 1 x cpu (1 thread) in float32; ",
        "30 of 30 LoRA modules read back correctly from the diffusers file",
        f"LoRA: {output_dir}/pytorch_lora_weights.safetensors",
        f"report: {output_dir}/report.html",
        "W&B run saved offline. To upload it: wandb sync ",
    ]
    for line, start in zip(done.stdout.splitlines(), starts, strict=True):
        assert line.startswith(start)
    for line in done.stderr.replace("\r", "\n").splitlines():  # progress bars only
        assert line.split(":")[0].strip() in ("", "encoding pictures", "encoding captions", "training"), line


def test_the_real_command_tells_nobody_the_token(real_run):
    done, output_dir = real_run
    files = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    tracked = b"".join(content for path, content in files.items() if path.suffix == ".wandb")
    assert b"--hub_token=***" in tracked  # shows that W&B's file can be searched, and contains the command
    assert [path for path, content in files.items() if b"never_to_be_seen" in content] == []
    assert "never_to_be_seen" not in done.stdout + done.stderr


def test_the_line_after_the_run_names_the_wandb_folder(real_run):
    done, output_dir = real_run
    named = (ROOT / done.stdout.splitlines()[-1].rpartition(" ")[2]).resolve()
    assert named.parent == (output_dir / "wandb").resolve()
    assert os.listdir(named)
