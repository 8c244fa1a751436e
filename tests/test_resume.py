"""A run that is interrupted anywhere and resumed by the command ends with equal weights, bit for bit.

Fault 4 of the diffusers example is in test_faults.py: the trailing slash, the limit, a finished run, and a full disk.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    TORCHRUN,
    make_transparent,
    read_lora,
    read_metrics,
    refusal_of,
    run_command,
    train_script,
    write_pictures,
)
from safetensors.torch import load_file, save_file

from text_to_image_lora.command_line import iterate_flags
from text_to_image_lora.errors import InputError
from text_to_image_lora.training.checkpoint import find_checkpoint, find_damage, read_state
from text_to_image_lora.training.manifest import write_manifest


MEASURED = ("images_per_second", "peak_memory_gib")


def assert_same_end(first, second, step):
    """Checks that LoRA, checkpoint and metrics are equal, except for times and memory."""
    a, b = read_lora(first), read_lora(second)
    assert a.keys() == b.keys()
    assert [key for key in a if not a[key].equal(b[key])] == []
    rows = [[{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(f)] for f in (first, second)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if "train_loss" in row] == list(range(1, step + 1))
    states = [
        torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True) for folder in (first, second)
    ]
    assert_equal(*states)


def assert_equal(a, b):
    """Compares nested dicts and lists that contain tensors."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def two_steps(train_in, tmp_path_factory):
    return train_in(tmp_path_factory.mktemp("two"))


@pytest.fixture
def two(two_steps, tmp_path):
    """A finished run of two steps, which `train` can resume."""
    return shutil.copytree(two_steps, tmp_path / "out")


@pytest.fixture(scope="module")
def six_steps(train_in, tmp_path_factory):
    """A finished run of two epochs: 6 pictures in batches of 2, and a checkpoint after each epoch."""
    return train_in(tmp_path_factory.mktemp("six"), max_train_steps=6, checkpointing_steps=3)


def stopped(run, copy, step):
    """Copies a run as if it had been stopped after the checkpoint of that step; one metrics line of a later step remains."""
    shutil.copytree(run, copy)
    for path in copy.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[: step + 2])[:-20])  # the last line is incomplete
    (copy / "pytorch_lora_weights.safetensors").unlink()
    return copy


def test_a_run_in_parts_is_the_run_straight_through(train, six_steps, tmp_path):
    """Each part asks for a few more steps: within an epoch, after it, and before the end of the next one."""
    for step in (2, 3, 5, 6):
        train(max_train_steps=step)
    assert_same_end(six_steps, tmp_path / "out", 6)


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (4, {"lora_dropout": 0.5}),
        (2, {"use_8bit_adam": True, "rank": 64}),
        (4, {"gradient_accumulation_steps": 2, "train_batch_size": 1, "random_flip": True, "noise_offset": 0.1}),
        (4, {"cache_variations": 0, "dataloader_num_workers": 1}),
        (4, {"mixed_precision": "bf16", "use_dora": True}),
        (2, {"alpha_mask": True, "random_flip": True, "validation_split": 0.34, "validation_steps": 3}),
        (4, {"alpha_mask": True, "cache_variations": 0}),
        (3, {"resolution": [32, 24], "train_batch_size": 4, "random_flip": True}),
    ],
    ids=[
        "dropout",
        "8-bit Adam",
        "accumulation",
        "live",
        "bf16 and DoRA",
        "opaque parts",
        "live opaque parts",
        "two resolutions",
    ],
)
def test_a_run_that_stopped_ends_as_the_run_straight_through(train, pictures, tmp_path, stop, options):
    if "alpha_mask" in options:
        make_transparent(pictures, (0, 2, 3, 5))
    options |= dict(max_train_steps=6, checkpointing_steps=stop)
    straight = train(output_dir=tmp_path / "one", **options)
    assert_same_end(straight, train(output_dir=stopped(straight, tmp_path / "two", stop), **options), 6)


def test_another_dropout_would_be_seen(train, tmp_path):
    """Shows that the comparison above detects different draws of the dropout."""
    first = train(lora_dropout=0.5, output_dir=tmp_path / "one")
    second = train(lora_dropout=0.4, output_dir=tmp_path / "two")
    with pytest.raises(AssertionError):
        assert_same_end(first, second, 2)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant_with_warmup"])
def test_a_resumed_run_continues_its_schedule(train, tmp_path, scheduler):
    """The run stopped after the checkpoint of step 3; of later steps, only lines of metrics.jsonl remain."""
    options = dict(max_train_steps=7, checkpointing_steps=3, lr_scheduler=scheduler, lr_warmup_steps=5)
    straight = train(output_dir=tmp_path / "one", **options)
    names = sorted(path.name for path in straight.glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    assert_same_end(straight, train(output_dir=stopped(straight, tmp_path / "two", 3), **options), 7)
    assert len({row["lr"] for row in read_metrics(straight)}) > 5


def test_a_killed_run_can_be_resumed(arguments, train, tmp_path, capsys):
    """Kills the real command while it trains; resuming it gives the weights of an undisturbed run."""
    options = dict(max_train_steps=40, checkpointing_steps=2, checkpoints_total_limit=2)
    killed = tmp_path / "killed"
    command = [sys.executable, "train_text_to_image_lora.py", *arguments(output_dir=killed, **options)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 120
        while not list(killed.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "pytorch_lora_weights.safetensors").exists()
    capsys.readouterr()
    train(output_dir=killed, **options)
    assert "resuming from" in capsys.readouterr().out
    assert_same_end(train(output_dir=tmp_path / "alone", **options), killed, 40)
    assert sorted(path.name for path in killed.glob("*checkpoint*")) == ["checkpoint-38", "checkpoint-40"]


@pytest.mark.long
def test_two_processes_resume_where_one_stopped(arguments, train, tmp_path):
    """No rank has a random state that a checkpoint could lose."""
    options = dict(learning_rate=1e-3)
    straight = train(max_train_steps=4, train_batch_size=4, output_dir=tmp_path / "one", **options)
    parts = train(max_train_steps=2, train_batch_size=4, output_dir=tmp_path / "two", **options)
    words = arguments(max_train_steps=4, train_batch_size=2, output_dir=parts, **options)
    done = run_command(words, TORCHRUN, env={"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming from") == 1
    a, b = read_lora(straight), read_lora(parts)
    difference, size = (torch.cat([v.flatten() for v in vs]).norm() for vs in ([a[k] - b[k] for k in a], a.values()))
    assert difference < 1e-3 * size
    assert [row["step"] for row in read_metrics(parts)] == [1, 2, 3, 4]


def test_the_seed_of_a_run_without_one_is_kept(train, tmp_path):
    output_dir = train(seed=None)
    seed = json.loads((output_dir / "checkpoint-2" / "state.json").read_text())["state"]["seed"]
    train(seed=None, max_train_steps=4)
    assert_same_end(train(seed=seed, max_train_steps=4, output_dir=tmp_path / "given"), output_dir, 4)
    with pytest.raises(InputError, match=rf"seed was {seed}, is {seed + 1}"):
        train(seed=seed + 1, max_train_steps=4)


@pytest.mark.parametrize("limit", [None, 1])
def test_none_starts_over(train, six_steps, tmp_path, capsys, limit):
    """It deletes the checkpoints of the abandoned run.

    Otherwise the limit would delete new checkpoints in favour of old ones, and `latest` would resume from an old one.
    """
    options = dict(max_train_steps=3, learning_rate=1e-3, checkpoints_total_limit=limit)
    straight = train(output_dir=tmp_path / "one", **options)
    output_dir = shutil.copytree(six_steps, tmp_path / "two")
    capsys.readouterr()
    train(resume_from_checkpoint="none", output_dir=output_dir, **options)
    assert "resuming from" not in capsys.readouterr().out
    assert_same_end(straight, output_dir, 3)
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-3"]


CHANGES = {
    "rank": (dict(rank=8, lora_alpha=4), "rank was 4, is 8"),
    "alpha": (dict(lora_alpha=8), "lora_alpha was 4, is 8.0"),
    "modules": (dict(target_modules=["to_q"]), "target_modules was ['to_q', 'to_k',"),
    "rsLoRA": (dict(use_rslora=True), "use_rslora was False, is True"),
    "DoRA": (dict(use_dora=True), "use_dora was False, is True"),
    "seed": (dict(seed=1), "seed was 0, is 1"),
    "batch": (dict(gradient_accumulation_steps=2), "effective_batch_size was 2, is 4"),
    "fewer pictures": (dict(max_train_samples=5), "dataset (the pictures, captions and repeats) was "),
    "prediction": (dict(prediction_type="v_prediction"), "prediction_type was 'epsilon', is 'v_prediction'"),
    "zero SNR": (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr was False, is True"),
    "clip skip": (dict(clip_skip=1), "clip_skip was None, is 1"),
    "resolution": (dict(resolution=40), "resolution was 32, is 40"),
    "loss": (dict(loss_type="huber"), "loss_type was 'mse', is 'huber'"),
    "Min-SNR": (dict(snr_gamma=5), "snr_gamma was None, is 5.0"),
    "timesteps": (dict(timestep_sampling="mode"), "timestep_sampling was 'uniform', is 'mode'"),
    "their range": (dict(timestep_range=[0, 500]), "timestep_range was None, is [0, 500]"),
    "noise offset": (dict(noise_offset=0.1), "noise_offset was 0.0, is 0.1"),
    "opaque parts": (dict(alpha_mask=True), "alpha_mask was False, is True"),
    "augmentation": (dict(random_flip=True, cache_variations=4), "random_flip was False, is True"),
    "empty captions": (dict(caption_dropout=0.1), "caption_dropout was 0.0, is 0.1"),
    "average": (dict(use_ema=True), "use_ema was False, is True"),
    "optimizer": (dict(optimizer="adafactor"), "optimizer was 'adamw', is 'adafactor'"),
    "LoRA+": (dict(loraplus_lr_ratio=16), "loraplus was False, is True"),
}


def assert_refused(train, output_dir, **changes):
    """Returns the error message, and checks that no file has changed."""
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    message = refusal_of(train, max_train_steps=4, **changes)
    assert f"{output_dir}/checkpoint-2: this checkpoint belongs to another run (" in message
    assert message.count(" was ") == 1
    assert message.endswith(
        "Pass another --output_dir, or --resume_from_checkpoint none to start over in this folder."
    )
    assert before == {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    return message


ANOTHER_DATASET = r"another run \(dataset \(the pictures, captions and repeats\) was '(\w+)', is '(?!\1)\w+'\)\. "


@pytest.mark.parametrize("what", CHANGES)
def test_another_run_is_refused_with_what_differs(train, two, what):
    changes, answer = CHANGES[what]
    assert f"({answer}" in assert_refused(train, two, **changes)


def test_another_resolution_too_is_another_run(train, two, tmp_path):
    """And one less. The samples of an epoch, of which the dataset's hash is made, are others too."""
    message = refusal_of(train, max_train_steps=4, resolution=[32, 24])
    assert f"{two}/checkpoint-2: this checkpoint belongs to another run (resolution was 32, is [24, 32]; " in message
    train(resolution=[32, 24], output_dir=tmp_path / "both")
    message = refusal_of(train, max_train_steps=4, resolution=24, output_dir=tmp_path / "both")
    assert "this checkpoint belongs to another run (resolution was [24, 32], is 24; " in message


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_other_weights_are_refused_wherever_they_come_from(train, two, tiny_sd, tmp_path, component):
    """From another revision, or from --pretrained_vae_model_name_or_path; the weights differ by a hundredth."""
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    if component == "unet":  # equal weights from another place belong to the run
        train(
            pretrained_model_name_or_path=model, output_dir=shutil.copytree(two, tmp_path / "same"), max_train_steps=3
        )
    (file,) = (model / component).glob("*.safetensors")
    torch.manual_seed(0)
    tuned = {
        name: value + 0.01 * value.std(correction=0) * torch.randn_like(value)
        for name, value in load_file(file).items()
    }
    save_file(tuned, file, {"format": "pt"})
    place = {"pretrained_model_name_or_path": model}
    if component == "vae":
        place = {"pretrained_vae_model_name_or_path": model / "vae"}
    assert re.search(rf"run \({component} weights was '\w+', is '\w+'\)", assert_refused(train, two, **place))


@pytest.mark.parametrize(
    ("part", "key", "value", "answer"),
    [
        ("unet", "attention_head_dim", 4, "unet config attention_head_dim was 2, is 4"),
        ("unet", "act_fn", "gelu", "unet config act_fn was 'silu', is 'gelu'"),
        ("vae", "norm_num_groups", 2, "vae config norm_num_groups was 4, is 2"),
        ("vae", "scaling_factor", 0.5, "vae config scaling_factor was 0.18215, is 0.5"),
        ("text_encoder", "hidden_act", "gelu", "text_encoder config hidden_act was 'quick_gelu', is 'gelu'"),
        ("scheduler", "beta_end", 0.02, "noise schedule beta_end was 0.012, is 0.02"),
        ("scheduler", "num_train_timesteps", 500, "noise schedule num_train_timesteps was 1000, is 500"),
    ],
)
def test_equal_weights_with_another_configuration_are_refused(train, two, tiny_sd, tmp_path, part, key, value, answer):
    """The files of a base model were replaced between the stop and the resumption."""
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    file = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    stored = json.loads(file.read_text())
    assert stored[key] != value
    file.write_text(json.dumps(stored | {key: value}))
    assert f"run ({answer})" in assert_refused(train, two, pretrained_model_name_or_path=model)


def test_another_vocabulary_is_refused(train, two, tiny_sd, tmp_path):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    (file,) = (model / "tokenizer").glob("tokenizer.json")
    stored = json.loads(file.read_text())
    words = stored["model"]["vocab"]
    words["red</w>"], words["blue</w>"] = words["blue</w>"], words["red</w>"]
    file.write_text(json.dumps(stored))
    message = assert_refused(train, two, pretrained_model_name_or_path=model)
    assert re.search(r"run \(vocabulary of tokenizer was '(\w+)', is '(?!\1)\w+'\)", message)


def test_settings_that_another_version_of_a_library_adds_do_not_matter(train, two, tmp_path):
    file = two / "checkpoint-2" / "state.json"
    stored = json.loads(file.read_text())
    assert stored["settings"]["unet config"].pop("freq_shift") == 0
    stored["settings"]["vae config"]["of_the_past"] = 3
    file.write_text(json.dumps(stored))
    write_manifest(file.parent)
    assert read_metrics(train(max_train_steps=3, output_dir=two))[-1]["step"] == 3


def test_every_flag_may_change_or_is_of_the_run(two):
    """A new flag must stay unchanged unless its field says otherwise."""
    words = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]
    fields = [field for field, _ in iterate_flags(train_script.parse_settings(words))]
    flags, may_change = (
        {field.name for field in fields},
        {field.name for field in fields if field.metadata["may_change"]},
    )
    of_the_run = read_state(two / "checkpoint-2")[1].keys()
    assert of_the_run.isdisjoint(may_change)
    assert flags - of_the_run == may_change
    base = {f"{name} {kind}" for name in ("unet", "text_encoder", "vae") for kind in ("weights", "config")}
    base |= {"noise schedule", "vocabulary of"}
    assert of_the_run - flags == {"effective_batch_size", "dataset", "num_chunks", "loraplus"} | base


def test_what_may_change_is_taken(train, two, capsys):
    """Paths, reports, the length of the run, and how its steps are computed."""
    train(
        max_train_steps=3, learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=1, max_grad_norm=0,
        adam_weight_decay=0, gradient_checkpointing=True, train_batch_size=1, gradient_accumulation_steps=2,
        report_to="tensorboard", validation_prompts=["a blue axe"], validation_steps=1, validation_split=0,
        checkpointing_steps=1, save_every_n_epochs=1, checkpoints_total_limit=2, latent_cache_limit=1, num_cpu_threads=2,
        mixed_precision="bf16", dataset_layout="metadata", config=two / "run.yaml",
    )  # fmt: skip
    assert "checkpoint-2 (step 2)" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(two)] == [1, 2, 3]


@pytest.mark.parametrize("what", ["pictures", "captions"])
def test_other_pictures_and_captions_are_refused(train, two, pictures, what):
    if what == "pictures":
        write_pictures(pictures, seed=1)
    else:
        file = pictures / "metadata.jsonl"
        file.write_text(file.read_text().replace("number 5", "number 6"))
    assert re.search(ANOTHER_DATASET, assert_refused(train, two))


def test_other_repeats_of_the_same_pictures_are_refused(train, tmp_path):
    folder = write_pictures(tmp_path / "set" / "1_axe")
    for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    (folder / "metadata.jsonl").unlink()
    output_dir = train(train_data_dir=tmp_path / "set")
    # The name after the number of repeats does not affect training.
    folder = folder.rename(tmp_path / "set" / "1_whip")
    train(train_data_dir=tmp_path / "set")
    folder.rename(tmp_path / "set" / "3_whip")
    assert re.search(ANOTHER_DATASET, assert_refused(train, output_dir, train_data_dir=tmp_path / "set"))


def test_other_samples_an_epoch_are_refused(train, pictures):
    """Pictures and captions are equal, but one of them has another concept, so that it is drawn more often."""
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]

    def sort_into(kinds):
        lines = [json.dumps(row | {"kind": kind}) + "\n" for row, kind in zip(rows, kinds, strict=True)]
        (pictures / "metadata.jsonl").write_text("".join(lines))

    options = dict(balance="concept", concept_column="kind")
    sort_into("aaaabb")
    output_dir = train(**options)
    sort_into("ccccdd")  # other names, but equal samples
    train(**options)
    sort_into("aaaaba")
    assert re.search(ANOTHER_DATASET, assert_refused(train, output_dir, **options))


def test_pictures_that_only_moved_are_the_same_run(train, two, pictures, tmp_path):
    pictures.rename(tmp_path / "elsewhere")
    train(max_train_steps=4, train_data_dir=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("name", "value"), [("lr_scheduler", "cosine"), ("learning_rate", 1e-4), ("adam_weight_decay", 0.5)]
)
def test_another_learning_rate_is_used(train, six_steps, tmp_path, name, value):
    out = train(output_dir=stopped(six_steps, tmp_path / "out", 3), max_train_steps=6, **{name: value})
    a, b = (read_metrics(folder)[-1] for folder in (out, six_steps))
    assert (a["lr"], a["train_loss"]) != (b["lr"], b["train_loss"])
    if name == "learning_rate":
        assert [row["lr"] for row in read_metrics(out)] == [1e-2] * 3 + [value] * 3
        stored = torch.load(out / "checkpoint-6" / "optimizer.pt", weights_only=True)
        assert [group["lr"] for group in stored["optimizer"]["param_groups"]] == [value]


def test_half_written_checkpoints_are_passed_over(train, two, tmp_path, capsys):
    straight, output_dir = train(max_train_steps=4, output_dir=tmp_path / "one"), two
    shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-9")
    (output_dir / "checkpoint-9" / "state.json").unlink()
    shutil.copytree(output_dir / "checkpoint-2", output_dir / ".checkpoint-9.tmp")
    shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-9.old")
    (output_dir / "checkpoint-notes.txt").write_text("mine")
    capsys.readouterr()
    train(max_train_steps=4, output_dir=output_dir)
    assert "checkpoint-2 (step 2)" in capsys.readouterr().out
    assert_same_end(straight, output_dir, 4)
    assert (output_dir / "checkpoint-notes.txt").read_text() == "mine"


FILES = [
    "adapter.safetensors", "optimizer.pt", "ema.pt", "state.json", "manifest.json", "pytorch_lora_weights.safetensors",
]  # fmt: skip
FILES += ["best/pytorch_lora_weights.safetensors"]


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place * len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES = {
    "cut off": cut_off, "emptied": empty, "removed": lambda path: path.unlink(), "flipped at its start": lambda path: flip(path, 0),
    "flipped in the middle": lambda path: flip(path, 1),
}  # fmt: skip
JUDGED = dict(max_train_steps=6, checkpointing_steps=2, use_ema=True, validation_split=0.34, validation_steps=2)


@pytest.fixture(scope="module")
def judged(train_in, tmp_path_factory):
    """A finished run whose checkpoints contain everything that a checkpoint can contain."""
    out = train_in(tmp_path_factory.mktemp("judged"), **JUDGED)
    found = {
        path.relative_to(out / "checkpoint-4").as_posix()
        for path in (out / "checkpoint-4").rglob("*")
        if path.is_file()
    }
    assert found == set(FILES)
    return out


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_seen_in_every_file(judged, tmp_path, file, what, said):
    path = shutil.copytree(judged / "checkpoint-4", tmp_path / "checkpoint-4")
    assert find_damage(path) is None
    DAMAGES[what](path / file)
    # A changed hash in the manifest damages the check of another file.
    named = "" if (file, what) == ("manifest.json", "flipped in the middle") else file
    assert find_damage(path).startswith(named)
    assert find_checkpoint(tmp_path, "latest") is None
    assert said[0].startswith(f"{path}: this checkpoint is damaged ({named}")
    assert said[1:] == [f"{tmp_path}: none of its checkpoints is intact, so training starts over from the first step"]
    with pytest.raises(
        InputError, match=rf"checkpoint-4: this checkpoint is damaged \({named}.*\)\. Resume from another one\.$"
    ):
        find_checkpoint(tmp_path, "checkpoint-4")


@pytest.mark.parametrize(("damaged", "found"), [((), "checkpoint-4"), (("4",), "checkpoint-2"), (("4", "2"), None)])
def test_starting_over_is_said_if_no_checkpoint_is_intact(judged, tmp_path, said, damaged, found):
    """Not if an earlier one is resumed, and not for a new run."""
    assert find_checkpoint(tmp_path / "new", "latest") is None
    assert said == []
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(judged / name, tmp_path / name)
    for step in damaged:
        (tmp_path / f"checkpoint-{step}" / "state.json").unlink()
    path = find_checkpoint(tmp_path, "latest")
    assert (None if path is None else path.name) == found
    assert any("training starts over from the first step" in line for line in said) == (found is None)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("adapter.safetensors", "flipped in the middle"),
        *(
            pytest.param(file, what, marks=pytest.mark.long)
            for file in FILES
            for what in DAMAGES
            if (file, what) != ("adapter.safetensors", "flipped in the middle")
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(train, judged, tmp_path, capsys, file, what):
    """The run resumes from the previous checkpoint, logs this, and ends with equal results."""
    out = stopped(judged, tmp_path / "out", 4)
    DAMAGES[what](out / "checkpoint-4" / file)
    capsys.readouterr()
    train(**JUDGED)
    said = capsys.readouterr().out
    assert said.count(f"{out}/checkpoint-4: this checkpoint is damaged (") == 1
    assert f"resuming from {out}/checkpoint-2 (step 2)" in said
    assert_same_end(judged, out, 6)
    assert find_damage(out / "checkpoint-4") is None  # written again
    best = [load_file(folder / "best" / "pytorch_lora_weights.safetensors") for folder in (judged, out)]
    assert_equal(*best)


def test_a_finished_run_says_how_to_continue(train, two, capsys):
    before = read_lora(two)
    train()
    assert "finished at step 2; raise --max_train_steps to continue" in capsys.readouterr().out
    train(max_train_steps=1)  # fewer steps than the run has made
    assert "finished at step 2; raise" in capsys.readouterr().out
    assert_equal(read_lora(two), before)
    train(max_train_steps=3)
    assert "finished at step" not in capsys.readouterr().out


@pytest.mark.parametrize(("scheduler", "before"), [("linear", "0"), ("constant", None)])
def test_a_longer_run_follows_its_own_curve_and_says_so(train, capsys, scheduler, before):
    out = train(lr_scheduler=scheduler, max_train_steps=4, lr_warmup_steps=1)
    train(lr_scheduler=scheduler, max_train_steps=4, lr_warmup_steps=1)
    assert "the learning rate changes" not in capsys.readouterr().out
    train(lr_scheduler=scheduler, max_train_steps=10, lr_warmup_steps=1)
    line = f"resuming from {out}/checkpoint-4 (step 4)"
    if before is not None:
        line += (
            f"; the learning rate changes from {before} to 0.00667, according to --lr_scheduler linear over 10 steps"
        )
    assert f"{line}\n" in capsys.readouterr().out
    rates = [row["lr"] for row in read_metrics(out)][4:]
    if before is not None:
        assert rates == pytest.approx([1e-2 * (10 - step) / 9 for step in range(4, 10)])


def test_the_limit_keeps_the_newest(train):
    output_dir = train(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in output_dir.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]
    assert read_lora(output_dir / "checkpoint-5").keys() == read_lora(output_dir).keys()


def test_checkpointing_steps_0_writes_none(train, capsys):
    output_dir = train(checkpointing_steps=0)
    assert list(output_dir.glob("*checkpoint*")) == []
    train(checkpointing_steps=0)
    assert "resuming from" not in capsys.readouterr().out


def test_a_refused_run_writes_no_preview(train, two, tmp_path):
    with pytest.raises(InputError, match="another run"):
        train(rank=8, lora_alpha=4, max_train_steps=4, preview_data=tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
