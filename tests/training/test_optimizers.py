"""Each optimizer trains, is resumed, and reports wrong options."""

import shutil

import pytest
import torch
from conftest import read_lora, read_metrics, refusal_of, relative_loss, train_script
from safetensors.torch import load_file

from text_to_image_lora.errors import InputError
from text_to_image_lora.training import optimizers


LEARNING_RATES = {"adamw": 2e-3, "adamw8bit": 2e-3, "prodigy": 1.0, "schedulefree": 5e-3, "adafactor": 2e-3}
STEPS = {"prodigy": 50}  # it first has to find its step size


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        "prodigy",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("adamw8bit", "schedulefree", "adafactor")),
    ],
)
def test_it_lowers_the_loss_on_the_weapons(name, train_on_weapons, tmp_path):
    """Trains the embedded base model for 20 or 50 steps, and validates the LoRA file on held-out pictures."""
    options = dict(optimizer=name, learning_rate=LEARNING_RATES[name], rank=8, max_train_steps=STEPS.get(name, 20))
    out = train_on_weapons(tmp_path / "out", **options)
    assert relative_loss(out) < 0.88
    if name == "prodigy":
        rates = [row["lr"] for row in read_metrics(out) if "lr" in row]
        assert rates == sorted(rates)
        assert rates[-1] > 3 * rates[0]


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, train, tmp_path):
    options = dict(
        optimizer=name, learning_rate=LEARNING_RATES[name], use_ema=True, max_train_steps=6, checkpointing_steps=3
    )
    straight = train(output_dir=tmp_path / "straight", **options)
    parts = shutil.copytree(straight, tmp_path / "parts")
    shutil.rmtree(parts / "checkpoint-6")
    (parts / "pytorch_lora_weights.safetensors").unlink()
    train(output_dir=parts, **options)
    for name in (".", "checkpoint-6"):
        a, b = read_lora(straight / name), read_lora(parts / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    first, second = (load_file(folder / "checkpoint-6" / "adapter.safetensors") for folder in (straight, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_resuming_uses_the_current_flags_and_the_learned_state(train):
    options = dict(optimizer="prodigy", learning_rate=1.0, checkpointing_steps=20)
    out = train(optimizer_args=["d_coef=4.0"], max_train_steps=20, **options)
    before = torch.load(out / "checkpoint-20" / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert before["d"] > before["d0"]
    train(optimizer_args=["d_coef=0.5"], max_train_steps=22, **options)
    after = torch.load(out / "checkpoint-22" / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert after["d_coef"] == 0.5
    assert after["d"] >= before["d"]
    assert after["k"] == 22


# Weights that are saved and validated.


def test_schedulefree_saves_its_average_and_continues_with_its_training_weights(train, tmp_path):
    options = dict(optimizer="schedulefree", learning_rate=1e-2, max_train_steps=4)
    out = train(output_dir=tmp_path / "one", **options)
    trained = load_file(out / "checkpoint-4" / "adapter.safetensors")
    saved = read_lora(out)
    assert not all(
        torch.allclose(saved["unet." + name.replace(".default", "")], value) for name, value in trained.items()
        if "lora_A" in name
    )  # fmt: skip
    # Validating in every step changes nothing.
    validated = train(output_dir=tmp_path / "two", validation_prompt="an axe", validation_steps=1, **options)
    again = load_file(validated / "checkpoint-4" / "adapter.safetensors")
    assert all(torch.equal(trained[name], again[name]) for name in trained)


def test_ema_saves_the_average_of_the_weights(train, tmp_path):
    """Compares it with an average computed from the checkpoints of every step."""
    options = dict(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=9, lora_alpha=4)
    plain = train(output_dir=tmp_path / "plain", **options)
    out = train(output_dir=tmp_path / "ema", use_ema=True, ema_decay=0.6, **options)
    steps = [load_file(out / f"checkpoint-{step}" / "adapter.safetensors") for step in range(1, 5)]
    trained = load_file(plain / "checkpoint-4" / "adapter.safetensors")
    assert all(
        torch.equal(trained[name], steps[-1][name]) for name in trained
    )  # the average does not change the training
    average = {name: torch.zeros_like(value) if "lora_B" in name else None for name, value in trained.items()}
    for step, weights in enumerate(steps, start=1):
        decay = min(0.6, step / (9 + step)) if step > 1 else 0.0  # EMAModel's: (1 + n) / (10 + n) after n steps
        for name in average:
            if average[name] is not None:
                average[name] = weights[name] + decay * (average[name] - weights[name])
    saved = read_lora(out)
    for name, value in average.items():
        if value is not None:
            torch.testing.assert_close(saved[f"unet.{name}"], value, rtol=1e-4, atol=1e-6)


def test_an_epochs_lora_is_the_average_too(train):
    out = train(use_ema=True, save_every_n_epochs=1, max_train_steps=6)
    epoch, end = read_lora(out / "epoch-0002"), read_lora(out)
    assert all(torch.equal(epoch[name], value) for name, value in end.items())
    trained = load_file(out / "checkpoint-6" / "adapter.safetensors")
    assert any(not torch.equal(end[f"unet.{name}"], value) for name, value in trained.items() if "lora_A" in name)


# Options.


def test_loraplus_has_two_learning_rates(train):
    out = train(loraplus_lr_ratio=16, learning_rate=1e-3, lr_scheduler="cosine", max_train_steps=4)
    groups = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-3, 16e-3]
    assert [len(group["params"]) for group in groups] == [1, 1]  # of all matrices A, and of all B


def test_options_reach_the_optimizer(train):
    out = train(optimizer="adafactor", optimizer_args=["clip_threshold=0.5", "beta1=0.9"])
    group = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert (group["clip_threshold"], group["beta1"], group["scale_parameter"]) == (0.5, 0.9, False)


def test_a_value_may_be_any_literal():
    words = ["betas=(0.9,0.99)", "eps=1e-6", "amsgrad=True", "foreach=false", "name=word"]
    expected = dict(betas=(0.9, 0.99), eps=1e-6, amsgrad=True, foreach=False, name="word")
    assert optimizers.parse_options(words) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(optimizer_args=["weight_dcay=0.1"]), "adamw has no such option. Did you mean weight_decay?"),
        (dict(optimizer="prodigy", optimizer_args=["d_coeff=2"]), "prodigy has no such option. Did you mean d_coef?"),
        (dict(optimizer_args=["weight_decay"]), "--optimizer_args weight_decay: write key=value"),
        (dict(optimizer_args=["lr=3"]), "--optimizer_args lr: adamw has no such option"),
        (dict(optimizer_args=["weight_decay=-1"]), "--optimizer adamw: Invalid weight_decay value: -1"),
        (dict(optimizer="prodigy", use_8bit_adam=True), "Pass one of --use_8bit_adam and --optimizer prodigy"),
        (
            dict(optimizer="schedulefree", lr_scheduler="cosine"),
            "schedulefree can't be combined with --lr_scheduler cosine",
        ),
        (dict(snr_gamma=5, debiased_estimation=True), "Pass one of --snr_gamma and --debiased_estimation"),
        (dict(lr_warmup_ratio=0.1, lr_warmup_steps=3), "Pass one of --lr_warmup_steps and --lr_warmup_ratio"),
        (dict(lr_warmup_ratio=1.5), "--lr_warmup_ratio 1.5: it must be from 0 to 1."),
        (dict(timestep_range=[500, 100]), "--timestep_range 500 100: write two numbers from 0 to 1000"),
        (dict(optimizer="prodigy", loraplus_lr_ratio=4), "--optimizer prodigy has a single learning rate"),
        (
            dict(optimizer="schedulefree", adam_beta1=0),
            "--optimizer schedulefree needs a first beta (--adam_beta1) above 0",
        ),
        (dict(mode_scale=-1.5), "--mode_scale -1.5: it must be from -1 to 1.75"),
        (dict(logit_mean="nan"), "--logit_mean nan: it must be from -100 to 100"),
        (dict(huber_c=0), "--huber_c 0: it must be more than 0"),
        (
            dict(optimizer="schedulefree", optimizer_args=["betas=0.9"]),
            '--optimizer_args betas=0.9: write a value such as (0.9,0.999) (quoted: "betas=(0.9,0.999)").',
        ),
        (dict(optimizer_args=["betas=(0.9,)"]), "--optimizer_args betas=(0.9,): write a value such as (0.9,0.999) "),
        (
            dict(optimizer="prodigy", optimizer_args=["betas=(1,2,3)"]),
            "betas=(1,2,3): write a value such as (0.9,0.999) ",
        ),
        (dict(optimizer_args=["betas=(0.9,'a')"]), "betas=(0.9,'a'): write a value such as (0.9,0.999) "),
        (dict(optimizer="adafactor", optimizer_args=["eps=1e-8"]), "eps=1e-08: write a value such as (1e-30,0.001) "),
        (dict(optimizer_args=["eps=(1,2)"]), "--optimizer_args eps=(1,2): write a value such as 1e-08."),
        (dict(optimizer_args=["weight_decay=true"]), "weight_decay=True: write a value such as 0.01."),
        (dict(optimizer_args=["weight_decay=1e999"]), "weight_decay=inf: write a value such as 0.01."),
        (dict(optimizer_args=["amsgrad=3"]), "--optimizer_args amsgrad=3: write a value such as False."),
        (dict(optimizer="adafactor", optimizer_args=["beta1=many"]), "beta1=many: write a value such as true or 0.5."),
        (dict(optimizer_args=["fused=True", "foreach=True"]), "--optimizer adamw: `fused` and `foreach` cannot be"),
        (dict(optimizer_args=["capturable=True"]), "--optimizer_args capturable: the training loop does not support"),
        (
            dict(optimizer="prodigy", optimizer_args=["d_coef=abc"]),
            "--optimizer_args d_coef=abc: write a value such as 1",
        ),
        (dict(optimizer="prodigy", scale_lr=True), "--optimizer prodigy finds the learning rate itself"),
        (dict(init_lora_weights="orthogonal", rank=3), "orthogonal needs an even rank, not 3"),
        (
            dict(init_lora_weights="orthogonal", target_modules=["to_q", "conv1"]),
            "The LoRA can't be added (Unknown init",
        ),
        (dict(lr_scheduler="polynomial", lr_warmup_ratio=1), "polynomial: 2 of 2 steps are warmup"),
        (dict(lr_scheduler="polynomial", learning_rate=1e-9, scale_lr=True), "polynomial ends at 1e-07"),
        (dict(lr_scheduler="polynomial", lr_power="nan"), "--lr_power nan: it must be 0 or more and finite."),
        (dict(noise_offset="inf"), "--noise_offset inf: it must be 0 or more and finite."),
        (dict(validation_guidance_scale="nan"), "--validation_guidance_scale nan: it must be 0 or more and finite."),
        (dict(ema_decay=1), "--ema_decay 1: it must be at least 0 and less than 1."),
    ],
    ids=str,
)
def test_bad_flags_are_reported(train, flags, message):
    assert message in refusal_of(train, **flags)


def test_an_optimizer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(
        optimizers.OPTIMIZERS, "prodigy", optimizers.OPTIMIZERS["prodigy"]._replace(module="no_such_package")
    )
    with pytest.raises(InputError, match="--optimizer prodigy needs prodigyopt. Run: pip install prodigyopt"):
        optimizers.check_optimizer("prodigy", [])


def test_prodigy_starts_at_its_d0_and_the_others_at_1e_4(train):
    assert read_metrics(train(optimizer="prodigy", learning_rate=None))[0]["lr"] == pytest.approx(1e-5)  # d0
    assert read_metrics(train(learning_rate=None, resume_from_checkpoint="none"))[0]["lr"] == 1e-4


def test_warmup_as_a_ratio(train):
    rows = read_metrics(train(lr_scheduler="constant_with_warmup", lr_warmup_ratio=0.5, max_train_steps=8))
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * min(k / 4, 1) for k in range(8)])


@pytest.mark.parametrize(
    "words",
    [["weight_decay=-1"], ["betas=(0.9,2)"], ["fused=True", "foreach=True"], ["betas=(0.9,0.99)", "eps=-1"]],
)
def test_options_out_of_their_bounds_are_refused_before_anything_is_loaded(words):
    with pytest.raises(InputError, match=r"^--optimizer adamw: .* Check --optimizer_args\.$"):
        optimizers.check_optimizer("adamw", words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamw", ["betas=[0.8,0.9]", "amsgrad=true", "eps=1"]),
        ("prodigy", ["betas=(0.9,0.99)", "beta3=0.9", "d_coef=2"]),
        ("schedulefree", ["warmup_steps=3", "r=0.5"]),
        ("adafactor", ["eps=(1e-30,1e-3)", "beta1=None", "beta1=0.9"]),
    ],
)
def test_good_options_are_accepted(name, words):
    assert optimizers.check_optimizer(name, words)[1] == optimizers.parse_options(words)


# What a run says about its learning rate.


def test_prodigys_learning_rate_is_logged(train):
    """The product of the schedule and of the rate that Prodigy has found, which acts in the step."""
    out = train(
        optimizer="prodigy", optimizer_args=["d0=3e-4"], learning_rate=None, max_train_steps=8, checkpointing_steps=1,
        checkpoints_total_limit=9,
    )  # fmt: skip
    rates = [row["lr"] for row in read_metrics(out) if "lr" in row]
    found = [
        torch.load(out / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"][0]["d"]
        for step in range(1, 8)
    ]
    assert rates == pytest.approx([3e-4, *found])


def test_prodigys_learning_rate_follows_the_schedule(train):
    out = train(optimizer="prodigy", learning_rate=0.5, max_train_steps=4, lr_scheduler="linear", lr_warmup_steps=2)
    assert [row["lr"] for row in read_metrics(out) if "lr" in row][:2] == pytest.approx([0, 0.25e-5])


NOTES = [
    ("--lr_warmup_steps 5", "--lr_warmup_steps has no effect with --lr_scheduler constant and"),
    (
        "--lr_warmup_ratio 0.1 --lr_scheduler piecewise_constant --lr_step_rules 1:2,0.1",
        "--lr_warmup_ratio has no effect",
    ),
    (
        "--lr_num_cycles 3 --lr_scheduler cosine",
        "--lr_num_cycles has no effect without --lr_scheduler cosine_with_restarts",
    ),
    ("--lr_power 2", "--lr_power has no effect without --lr_scheduler polynomial"),
    ("--lr_step_rules 1:2,0.1", "--lr_step_rules has no effect without --lr_scheduler piecewise_constant"),
    (
        "--optimizer prodigy --learning_rate 1e-4",
        "--learning_rate is a factor of the learning rate that --optimizer prod",
    ),
    (
        "--optimizer prodigy --learning_rate 100",
        "--learning_rate is a factor of the learning rate that --optimizer prod",
    ),
    ("--ema_decay 0.9", "--ema_decay has no effect without --use_ema"),
    ("--huber_c 0.2", "--huber_c has no effect without --loss_type huber"),
    ("--logit_mean 1", "--logit_mean has no effect without --timestep_sampling logit_normal"),
    ("--keep_tags 1", "--keep_tags has no effect without --shuffle_tags or --caption_tag_dropout"),
    ("--prior_loss_weight 0.5", "--prior_loss_weight has no effect without --class_data_dir or --num_class_images"),
    ("--class_guidance_scale 4", "--class_guidance_scale has no effect without --num_class_images"),
]
SILENT = [
    "", "--lr_scheduler cosine --lr_warmup_steps 5", "--lr_warmup_steps 0", "--lr_scheduler cosine_with_restarts --lr_num_cycles 3",
    "--lr_num_cycles 1", "--optimizer prodigy", "--optimizer prodigy --learning_rate 0.5", "--learning_rate 1e-4",
    "--use_ema --ema_decay 0.9", "--shuffle_tags --keep_tags 1", "--lr_scheduler constant_with_warmup --lr_warmup_ratio 0.1",
]  # fmt: skip


@pytest.mark.parametrize(("words", "note"), [*NOTES, *((words, None) for words in SILENT)])
def test_flags_without_effect_are_noted_in_one_line(words, note):
    least = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "folder"]
    notes = train_script.parse_settings([*least, *words.split()]).notes
    assert [line[: len(note)] for line in notes] == [note] if note else notes == []


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (dict(lr_scheduler="cosine", lr_warmup_steps=5), 5),
        (dict(lr_scheduler="linear", lr_warmup_steps=2), 2),
        (dict(lr_scheduler="constant_with_warmup", lr_warmup_ratio=1), 2),
        (dict(lr_scheduler="constant_with_warmup", lr_warmup_steps=1), None),
        (dict(lr_warmup_steps=5), None),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_warmup_that_is_longer_than_the_run_is_noted(train, capsys, flags, steps, dry_run):
    train(**flags, dry_run=dry_run)
    said = capsys.readouterr().out
    flag = "lr_warmup_ratio" if "lr_warmup_ratio" in flags else "lr_warmup_steps"
    line = f"--{flag}: the warmup of {steps} steps does not end in the run of 2 steps, so"
    assert said.count(line) == (steps is not None)
    assert said.count("does not end in the run") == (steps is not None)
