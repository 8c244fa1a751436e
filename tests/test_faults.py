"""Every fault of diffusers' train_text_to_image_lora.py, checked with our command. Docstrings describe the fault.

This file contains what can be seen in one process. test_equivalence.py has two processes (fault 2), test_resume.py
bit-for-bit resuming (fault 4), test_precision.py precision and alpha (faults 3 and 8), test_cli.py the time of --help
(fault 11).
"""

import contextlib
import gc
import io
import json
import shutil
import socket
import types
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
import transformers
import wandb
from conftest import batch_sampler, read_lora, read_metrics, refusal_of, write_pictures
from PIL import Image
from safetensors.torch import load_file

from text_to_image_lora.drawing.as_trained import AsTrained
from text_to_image_lora.drawing.pipeline import Studio
from text_to_image_lora.drawing.rows import Drawing
from text_to_image_lora.errors import InputError, TrainingError
from text_to_image_lora.models import families
from text_to_image_lora.models.latents import LatentEncoder
from text_to_image_lora.reports import model_card, sample_pictures
from text_to_image_lora.reports.sample_pictures import Painter
from text_to_image_lora.training import objective


TOKEN = "hf_NeverToBeSeenAnywhere"


@contextlib.contextmanager
def spying():
    """Collects the inputs of each forward and backward pass: latents, noise, timesteps, and the weights of the loss."""
    rows, target, diffusion_loss = [], objective.Diffusion.target, objective.diffusion_loss

    def spy_target(diffusion, latents, noise, timesteps):
        rows.append(types.SimpleNamespace(latents=latents, noise=noise, timesteps=timesteps.tolist()))
        return target(diffusion, latents, noise, timesteps)

    def spy_loss(model_pred, target, weights, *rest):
        rows[-1].weights = weights
        return diffusion_loss(model_pred, target, weights, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective.Diffusion, "target", spy_target)
        patch.setattr(objective, "diffusion_loss", spy_loss)
        yield rows


@pytest.fixture
def seen():
    with spying() as rows:
        yield rows


STRAIGHT = dict(
    max_train_steps=6, center_crop=True, checkpointing_steps=1, checkpoints_total_limit=7,
    validation_prompt="a red axe",
)  # fmt: skip


@pytest.fixture(scope="module")
def straight(train_in, tmp_path_factory):
    """A run of two epochs without a network, which several tests share: its folder, its inputs, and its messages."""
    folder, said = tmp_path_factory.mktemp("straight"), io.StringIO()

    def refuse(*args):
        raise OSError("no network here")

    with spying() as rows, contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        out = train_in(folder, **STRAIGHT)
    return types.SimpleNamespace(folder=folder, out=out, seen=rows, said=said.getvalue())


@pytest.fixture
def stopped(straight, arguments, train, tmp_path):
    """Returns `stopped(step, **flags)`, which copies the run as it was after that step, and resumes it."""

    def resume(step, **changes):
        output_dir = tmp_path / f"from-{step}"
        for name in [f"checkpoint-{n}" for n in range(1, step + 1)]:
            shutil.copytree(straight.out / name, output_dir / name, dirs_exist_ok=True)
        flags = STRAIGHT | dict(train_data_dir=straight.folder / "pictures", output_dir=output_dir) | changes
        return train(**flags)

    return resume


@pytest.fixture
def changed_model(tiny_sd, tmp_path):
    """Copies the tiny model with other settings of its scheduler or its index; all other files are links."""

    def build(scheduler=None, index=None):
        folder = tmp_path / "changed-model"
        folder.mkdir()
        for path in tiny_sd.iterdir():
            if path.is_dir() and path.name != "scheduler":
                (folder / path.name).symlink_to(path)
        (folder / "scheduler").mkdir()
        for name, changes in (("model_index.json", index), ("scheduler/scheduler_config.json", scheduler)):
            (folder / name).write_text(json.dumps(json.loads((tiny_sd / name).read_text()) | (changes or {})))
        return folder

    return build


def assert_equal_loras(first, second):
    a, b = read_lora(first), read_lora(second)
    assert a.keys() == b.keys()
    assert [key for key in a if not a[key].equal(b[key])] == []


def distance(first, second):
    """Returns the relative distance of two LoRA files."""
    a, b = read_lora(first), read_lora(second)
    difference, size = (torch.cat([v.flatten() for v in vs]).norm() for vs in ([a[k] - b[k] for k in a], a.values()))
    return (difference / size).item()


def snapshot(folder):
    """Returns {name: bytes} of the files in a folder, without report.html, which contains the time."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "report.html"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# 1 and 2: the loop.


def test_fault_01_clipping_clips(train, tmp_path):
    """The optimizer exhausts the iterator of parameters, so that no gradients are clipped."""
    # lora_B starts at zero, and with an epsilon of 1, Adam's step is proportional to the gradient.
    options = dict(adam_epsilon=1.0, adam_weight_decay=0, learning_rate=1.0, max_train_steps=1)
    norms, sizes = [], []
    for name, max_grad_norm in (("free", 0), ("loose", 1e9), ("tight", 1e-6)):
        output_dir = train(max_grad_norm=max_grad_norm, output_dir=tmp_path / name, **options)
        norms.append([row["grad_norm"] for row in read_metrics(output_dir)])
        sizes.append(sum(value.norm() for key, value in read_lora(output_dir).items() if "lora_B" in key))
    assert sizes[0] == sizes[1]
    assert sizes[2] < 1e-3 * sizes[0]
    assert norms[0][0] == norms[1][0] == norms[2][0] > 1e-3  # the logged norm is that before clipping


def test_fault_02_every_sample_has_its_own_noise(straight):
    """Every rank has one seed, so that all ranks draw equal noise and timesteps."""
    noise = torch.cat([row.noise for row in straight.seen])
    timesteps = [t for row in straight.seen for t in row.timesteps]
    assert len(noise) == len(timesteps) == 12
    assert (torch.corrcoef(noise.flatten(1)) - torch.eye(12)).abs().max() < 0.5
    assert len(set(timesteps)) == 12
    # A draw depends on (step, position), and all ranks have different positions.
    options = dict(batch_size=2, accumulation=2, world_size=2, seed=0, num_steps=1)
    ranks = [batch_sampler(np.ones(8, int), rank=rank, **options) for rank in range(2)]
    positions = [sample.position for sampler in ranks for batch in sampler for sample in batch]
    assert sorted(positions) == list(range(8))


# 3: precision; test_precision.py has the rest.


def test_fault_03_the_launchers_precision_keeps_the_lora_in_float32(train, tmp_path, monkeypatch):
    """The script does not know the launcher's precision: in bf16, the LoRA and Adam lose most updates; in fp16, it fails."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    output_dir = train(learning_rate=1e-4, max_train_steps=3)
    adapter = load_file(output_dir / "checkpoint-3" / "adapter.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert_equal_loras(output_dir, train(learning_rate=1e-4, max_train_steps=3, mixed_precision="bf16",
                                         output_dir=tmp_path / "flag"))  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where fp16 is fine")
def test_fault_03_fp16_without_a_gpu_is_refused(train, monkeypatch):
    """fp16 on a CPU is silently float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        train()


# 4: resuming; test_resume.py has more.


def test_fault_04_a_resumed_run_continues_in_the_epochs_order(straight, stopped, seen):
    """The epoch starts again in a new order: some pictures come twice, others not at all."""
    assert "3 steps an epoch" in straight.said
    for step in (1, 5):
        seen.clear()
        stopped(step)
        assert len(seen) == 6 - step
        for a, b in zip(straight.seen[step:], seen):
            assert a.latents.equal(b.latents)
            assert a.noise.equal(b.noise)
            assert a.timesteps == b.timesteps


def test_fault_04_a_trailing_slash_is_no_other_folder(straight, stopped, tmp_path, capsys):
    """os.path.basename("checkpoint-1/") is "", so that training starts over."""
    for wanted in ("checkpoint-1/", f"{tmp_path}/from-2/checkpoint-1/"):
        capsys.readouterr()
        output_dir = stopped(2, max_train_steps=2, resume_from_checkpoint=wanted)
        assert "checkpoint-1 (step 1)" in capsys.readouterr().out
        assert_equal_loras(straight.out / "checkpoint-2", output_dir)
        (output_dir / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"this is not a checkpoint .* there are: checkpoint-1, checkpoint-2\."):
        stopped(2, max_train_steps=2, resume_from_checkpoint="checkpoint-7/")


def test_fault_04_fewer_checkpoints_than_the_limit(straight):
    """checkpoint_old is taken from an empty list, which raises an IndexError."""
    assert len(list(straight.out.glob("checkpoint-*"))) == 6 < STRAIGHT["checkpoints_total_limit"]


def test_fault_04_a_finished_run_ends_well_again(straight, train_in):
    """UnboundLocalError, because the loop that would set the variable is not entered."""
    before = snapshot(straight.out)
    after = snapshot(train_in(straight.folder, **STRAIGHT))
    assert [name for name in before | after if before.get(name) != after.get(name)] == []
    assert "validation/step-000006/prompt-00-0.png" in after["README.md"].decode()


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_fault_04_the_old_checkpoint_goes_after_the_new_one_came(straight, train, tmp_path, monkeypatch, fails):
    """Old checkpoints are deleted first, and a new one is written in place, so that a full disk leaves none."""
    options = STRAIGHT | dict(
        max_train_steps=2,
        checkpoints_total_limit=1,
        validation_prompt=None,
        train_data_dir=straight.folder / "pictures",
    )
    owner, name = {"write": (torch, "save"), "rename": (shutil.os, "replace")}[fails]
    function, calls = getattr(owner, name), []

    def full_disk(*args, **kwargs):
        if name == "save" or "checkpoint-" in str(args[1]).rpartition("/")[2]:
            calls.append(args)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        with pytest.raises((OSError, TrainingError)) as caught:
            train(**options)
    assert "No space left on device" in str(caught.value)
    assert len(calls) == 2
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert [name for name in left if "checkpoint" in name] == ["checkpoint-1"]
    assert_equal_loras(straight.out / "checkpoint-2", train(**options))
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]


# 5: secrets.


@pytest.fixture
def tracked_run(train, tmp_path, monkeypatch):
    """A run with W&B that uploads: its folder, the steps of the pictures that were logged, and the uploads."""
    uploads, steps, log = [], [], wandb.Run.log
    (tmp_path / "config.yaml").write_text(f"hub_token: {TOKEN}\n")
    ways = {
        "word": ("hub_token", TOKEN),
        "equals": (f"hub_token={TOKEN}", True),
        "config": ("config", tmp_path / "config.yaml"),
    }

    def spy(run, values, step=None, **kwargs):
        if any(name.startswith("samples/") for name in values):
            steps.append(step)
        return log(run, values, step=step, **kwargs)

    def run(way):
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(model_card, "upload", lambda *args: uploads.append(args) or "https://hub/commit/1")
        monkeypatch.setattr(wandb.Run, "log", spy)
        out = train(
            report_to="wandb", validation_prompt="a red axe", validation_steps=1, push_to_hub=True, **dict([ways[way]])
        )
        return types.SimpleNamespace(out=out, steps=steps, uploads=uploads)

    return run


@pytest.mark.parametrize("way", ["equals", *(pytest.param(way, marks=pytest.mark.long) for way in ("word", "config"))])
def test_fault_05_the_token_is_in_no_file(tracked_run, way):
    """The trackers get vars(args) with hub_token, and their files are uploaded.

    And fault 6: pictures are logged without a step, so that they appear beside the wrong metrics.
    """
    run = tracked_run(way)
    assert run.uploads[0][2] == TOKEN  # shows that the token was read
    wandb.teardown()  # the process of W&B writes its file shortly after the end of a run
    files = snapshot(run.out)
    tracked = b"".join(content for name, content in files.items() if name.endswith(".wandb"))
    assert str(run.out).encode() in tracked  # shows that the file contains the command
    files["report.html"] = (run.out / "report.html").read_bytes()
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []
    kinds = {".yaml", ".jsonl", ".safetensors", ".md", ".json", ".pt", ".wandb", ".png"}
    assert kinds <= {"." + name.rpartition(".")[2] for name in files}
    assert run.steps == [0, 1, 2]
    names = [path.name for path in run.out.glob("wandb/offline-run-*/files/media/images/samples/*.png")]
    # Beside the picture of the base model.
    assert sorted(name.split("_")[1] for name in names) == ["0", "1", "1", "2", "2"]


# 6: what is loaded, when, and who makes the pictures.


def test_fault_06_vae_and_text_encoder_run_once_and_leave(train, monkeypatch):
    """They run in every step, again on known pictures and captions, and stay in memory."""
    calls, alive = {"__call__": 0, "encode_prompts": 0}, []
    for owner, name in ((LatentEncoder, "__call__"), (families, "encode_prompts")):
        function = getattr(owner, name)

        def count(*args, name=name, function=function, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    def models_in_memory():
        kinds = (diffusers.AutoencoderKL, transformers.CLIPTextModel)
        return [thing for thing in gc.get_objects() if type(thing) in kinds]

    others = models_in_memory()  # memory that other tests use

    family = families.STABLE_DIFFUSION

    def look(*args, **condition):
        if not alive:
            mine = [thing for thing in models_in_memory() if all(thing is not other for other in others)]
            alive.extend(type(thing).__name__ for thing in mine)
            alive.append("looked")
        return family.predict(*args, **condition)

    monkeypatch.setattr(families, "FAMILIES", (family._replace(predict=look),))
    train(max_train_steps=6, checkpointing_steps=0)
    assert alive == ["looked"]
    assert calls["__call__"] == 1
    first = dict(calls)
    train(max_train_steps=6, checkpointing_steps=0)
    assert calls["__call__"] == first["__call__"]  # the cache has them
    assert calls["encode_prompts"] == first["encode_prompts"] > 0


def test_fault_06_validation_loads_nothing(train, monkeypatch):
    """Each validation loads the complete pipeline again."""
    loaded = []
    for owner in (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.StableDiffusionPipeline):
        function = owner.from_pretrained

        def count(*args, owner=owner, function=function, **kwargs):
            loaded.append(owner.__name__)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, "from_pretrained", count)
    output_dir = train(validation_prompt="a red axe", validation_steps=1)
    assert len(list((output_dir / "validation").iterdir())) == 3
    assert sorted(loaded) == ["AutoencoderKL", "UNet2DConditionModel"]


def test_fault_06_every_process_makes_its_share_of_the_pictures(monkeypatch):
    """Only the main process draws them, and the others wait."""
    made = []

    def draw_batch(studio, drawings, batch, on_step):
        made.extend(drawings[index].seed for index in batch.indices)
        return []

    monkeypatch.setattr(sample_pictures, "draw_batch", draw_batch)
    monkeypatch.setattr(
        "accelerate.utils.gather_object", lambda objects: [dict.fromkeys(range(8))] if objects == [{}] else objects
    )
    pipe = types.SimpleNamespace(unet=torch.nn.Linear(1, 1), vae=torch.nn.Linear(1, 1))
    pipe.vae.device = torch.device("cpu")
    encoder = types.SimpleNamespace(num_chunks=lambda drawing: 0)
    studio = Studio(pipe, families.STABLE_DIFFUSION, {}, {}, AsTrained(), encoder)
    drawings = [Drawing(prompt=prompt, seed=5 + k) for prompt in ("a red axe", "a blue axe") for k in range(4)]
    shares = []
    for rank in range(2):
        accelerator = types.SimpleNamespace(
            device=torch.device("cpu"), process_index=rank, num_processes=2, is_local_main_process=False
        )
        made.clear()
        Painter(Path(), accelerator, studio, drawings=drawings).generate(drawings)
        shares.append(sorted(made))
    assert [len(share) for share in shares] == [4, 4]
    assert sorted(shares[0] + shares[1]) == [5, 5, 6, 6, 7, 7, 8, 8]


def test_fault_06_no_safety_checker_blackens_pictures(train, changed_model):
    """Validation uses the base model's safety checker, which blackens some unusual pictures."""
    index = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    output_dir = train(pretrained_model_name_or_path=changed_model(index=index), validation_prompt="a red axe")
    for path in (output_dir / "validation").glob("*/prompt-*.png"):
        assert np.asarray(Image.open(path)).std() > 1


# 7: zero terminal SNR.


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ({"trained_betas": [0.5, 1.0]}, {}),
        ({}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {}),
    ],
    ids=["epsilon", "v_prediction", "of the base model"],
)
def test_fault_07_snr_gamma_at_zero_terminal_snr(train, changed_model, seen, scheduler, options):
    """The weight at SNR 0 is 0 / 0, and the SNR is computed from the schedule before it was rescaled."""
    # The schedule has two timesteps, so that about every second sample has the last one.
    base = changed_model(scheduler=scheduler | {"num_train_timesteps": 2})
    output_dir = train(pretrained_model_name_or_path=base, snr_gamma=5.0, max_train_steps=4, **options)
    assert all(np.isfinite(row["train_loss"]) for row in read_metrics(output_dir))
    assert all(value.isfinite().all() for value in read_lora(output_dir).values())
    at_zero = torch.cat([row.weights[torch.tensor(row.timesteps) == 1] for row in seen])
    assert len(at_zero)
    # In the limit, min(SNR, gamma) / SNR is 1 and min(SNR, gamma) / (SNR + 1) is 0; each sample is half of the batch.
    wanted = 0.5 if "trained_betas" in scheduler else 0.0
    assert at_zero.tolist() == pytest.approx([wanted] * len(at_zero), abs=1e-6)


def test_fault_07_noise_can_not_be_predicted_at_zero_snr(train):
    """The run trains, but the last timestep learns nothing."""
    with pytest.raises(InputError, match="--rescale_betas_zero_snr needs --prediction_type v_prediction"):
        train(rescale_betas_zero_snr=True)


# 9: pictures and captions.


def test_fault_09_transparent_is_white_and_sixteen_bit_keeps_its_range(straight, train, tmp_path):
    """Transparent pixels get whatever colour is stored below them, and 16-bit pictures saturate to white."""
    odd, plain = (write_pictures(tmp_path / name) for name in ("odd", "plain"))
    for k, path in enumerate(sorted(odd.glob("*.png"))):
        if k % 2:
            grey = Image.open(path).convert("L")
            grey.save(plain / path.name)
            Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path)
            with Image.open(path) as image:
                assert image.mode == "I;16"
        else:
            image = Image.open(path).convert("RGBA")
            alpha = Image.linear_gradient("L").resize(image.size)
            image.putalpha(alpha)
            image.save(path)
            paper = Image.new("RGBA", image.size, "white")
            Image.alpha_composite(paper, image).convert("RGB").save(plain / path.name)
    first = train(train_data_dir=odd, output_dir=tmp_path / "a", center_crop=True)
    assert_equal_loras(first, train(train_data_dir=plain, output_dir=tmp_path / "b", center_crop=True))
    # The stored colours, including those of transparent pixels.
    assert distance(first, straight.out / "checkpoint-2") > 1e-3


def test_fault_09_an_empty_caption_is_reported_before_training(train, pictures, tmp_path, capsys):
    """It raises an error in the middle of an epoch."""
    table = pictures / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    in_lists = [row | {"text": [row["text"]] if i != 3 else []} for i, row in enumerate(rows)]
    for given in (in_lists, [row | {"text": row["text"] if i != 3 else None} for i, row in enumerate(rows)]):
        table.write_text("\n".join(map(json.dumps, given)))
        message = refusal_of(train)
        assert message == (
            f"{table}:4: column 'text' is empty. Fix the row, or pass --skip_bad_images to leave such rows out."
        )
        assert not (tmp_path / "out").exists()
        if given is in_lists:
            train(skip_bad_images=True, dry_run=True, output_dir=tmp_path / "looked-at")
        else:
            train(skip_bad_images=True, max_train_steps=1)
        assert "5 pictures" in capsys.readouterr().out


def test_fault_09_a_truncated_caption_is_reported(straight, train, tmp_path, capsys):
    """Captions of more than 77 tokens are truncated without a message."""
    folder = write_pictures(tmp_path / "long", captions=["a red axe " * 40, "a blue axe"])
    train(train_data_dir=folder, max_train_steps=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "token" in line]
    assert len(said) == 1
    assert "3" in said[0]  # captions are too long
    assert "metadata.jsonl:1" in said[0]
    assert "token" not in straight.said


# 10: zeros, no prompt, no network.


@pytest.mark.parametrize("flags", [["num_validation_images"], ["validation_epochs", "checkpointing_steps"]], ids=str)
def test_fault_10_zero_means_none(straight, train, flags):
    """Zero is a division by zero, or an empty list of pictures that is stacked."""
    output_dir = train(max_train_steps=6, validation_prompt="a red axe", **dict.fromkeys(flags, 0))
    assert read_lora(output_dir)
    assert sorted(path.name for path in straight.out.glob("validation/*")) == [
        "step-000000", "step-000003", "step-000006"
    ]  # fmt: skip
    steps = [] if "num_validation_images" in flags else ["step-000000", "step-000006"]
    assert sorted(path.name for path in output_dir.glob("validation/*")) == steps
    checkpoints = [] if "checkpointing_steps" in flags else ["checkpoint-6"]
    assert [path.name for path in output_dir.glob("*checkpoint*")] == checkpoints


def test_fault_10_a_failed_upload_loses_nothing(train, monkeypatch):
    """The run ends in a traceback, and only a complete new run uploads again.

    Without a prompt, it stacks pictures that were never drawn after all training, and uploads nothing.
    """
    uploads = []

    def upload(output_dir, *args):
        uploads.append((snapshot(Path(output_dir)), args))
        if len(uploads) == 1:
            raise OSError("no such host\nand more")
        return "https://hub/commit/1"

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(model_card, "upload", upload)
    options = dict(push_to_hub=True, hub_model_id="owner/axes", hub_token="hf_mine")
    with pytest.raises(TrainingError) as caught:
        train(**options)
    assert "\n" not in str(caught.value)
    assert "run the same command again to upload it" in str(caught.value)
    train(**options)
    (first, args), second = uploads
    assert (first, args) == second
    assert args == ("owner/axes", "hf_mine", ["pytorch_lora_weights.safetensors"])
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= first.keys()
    assert first["pytorch_lora_weights.safetensors"]


def test_fault_10_no_network_is_needed(straight):
    """Offline, it fails after all training, when it loads the base model again for the last pictures."""
    assert (straight.out / "validation" / "step-000006" / "prompt-00-0.png").is_file()
    assert read_lora(straight.out)


# 11: typos.


@pytest.mark.parametrize(
    ("flag", "answer"),
    [("caption_column", r"there is no column 'txet' \(--caption_column\)"), ("image_column", "no column 'txet'")],
)
def test_fault_11_a_wrong_column_is_reported_before_the_download(train, tmp_path, monkeypatch, flag, answer):
    """Gigabytes are downloaded before the error."""
    features = datasets.Features({"image": datasets.Image(), "en_text": datasets.Value("string")})
    builder = types.SimpleNamespace(info=datasets.DatasetInfo(features=features))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **kwargs: builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("it was downloaded"))
    with pytest.raises(InputError, match=answer + r".* The columns are: image, en_text\."):
        train(train_data_dir=None, dataset_name="owner/axes", **{flag: "txet"})
    assert not (tmp_path / "out").exists()


# 12: the cache.


def test_fault_12_a_cached_picture_keeps_its_caption(train, tmp_path):
    """Some other scripts index a latent cache by step although the loader shuffles, which gives another picture's latents."""
    options = dict(center_crop=True, max_train_steps=7, train_batch_size=1)  # into the second epoch
    cached = train(cache_variations=1, output_dir=tmp_path / "cached", **options)
    live = train(cache_variations=0, output_dir=tmp_path / "live", **options)
    assert distance(cached, live) < 1e-3
    # If each caption belongs to the next picture, it is another run.
    folder = tmp_path / "pictures"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    rows = [{**row, "text": text} for row, text in zip(rows, texts[1:] + texts[:1])]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert distance(cached, train(cache_variations=0, output_dir=tmp_path / "moved", **options)) > 1e-2
