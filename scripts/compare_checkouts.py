#!/usr/bin/env python
"""Trains with the same seeds in two checkouts and compares what they leave, bit for bit.

    python scripts/compare_checkouts.py --before HEAD
    python scripts/compare_checkouts.py --before HEAD~3 --runs plain buckets --work_dir ../compare

For a change that is to change no number. Each run is short and trains on the embedded base; together they reach most
of what the flags can do. Compared are the tensors of every .safetensors file, the metrics that don't measure the
machine, and the pixels of every picture. What a commit leaves is kept in --work_dir, so that comparing with it again
costs only the other side. Exit code 0: all are equal; 1: one differs or fails; 2: there is nothing to compare with.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "train_text_to_image_lora.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TIMEOUT = 600  # seconds for one command: processes that wait for each other would wait for half an hour
OF_THE_MACHINE = ("images_per_second", "peak_memory_gib")
ENVIRONMENT = {
    # Sums are in one order only with one thread.
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
NOT_PASSED_ON = ("ACCELERATE_MIXED_PRECISION", "WANDB_API_KEY", "PYTHONPATH")

# As in a shell: $data is the folder that `make_data` writes, $out the run's own, and after && comes a second command.
COMMON = """--pretrained_model_name_or_path models/mini-sd --resolution 128 --seed 7 --rank 4 --learning_rate 2e-3
    --train_batch_size 4 --num_validation_images 1 --validation_inference_steps 3 --validation_epochs 0
    --report_to none --output_dir $out --latent_cache_dir $out/cache"""
RUNS = {
    "plain": """--train_data_dir metadata/weapons --max_train_samples 22 --num_train_epochs 2 --random_flip
        --random_crop_scale 0.8 --lr_scheduler cosine --noise_offset 0.1 --snr_gamma 5
        --validation_prompt 'a red axe'""",
    "live": """--train_data_dir $data/tags --max_train_steps 6 --cache_variations 0 --dataloader_num_workers 1
        --shuffle_tags --keep_tags 1 --caption_dropout 0.3 --input_perturbation 0.1 --random_flip --random_rotation 15
        --random_brightness 0.2 --random_contrast 0.2 --random_saturation 0.2 --random_hue 0.05""",
    "buckets": """--train_data_dir $data/shapes --num_train_epochs 2 --train_batch_size 2 --aspect_ratio_buckets
        --balance concept --class_data_dir $data/class --class_prompt 'a spear' --prior_loss_weight 0.5
        --preview_data $out/preview.png""",
    "validation": """--train_data_dir metadata/weapons --max_train_samples 26 --max_train_steps 14 --center_crop
        --learning_rate 2e-2 --use_ema --ema_decay 0.7 --validation_split 0.15 --validation_steps 2
        --early_stopping_patience 2 --validation_prompts 'a red axe' 'a blue whip'
        --validation_negative_prompt pink""",
    "text_encoder": """--train_data_dir metadata/creatures --max_train_samples 16 --max_train_steps 6
        --train_text_encoder --text_encoder_rank 2 --text_encoder_lr 1e-3 --clip_skip 1 --gradient_checkpointing
        --caption_dropout 0.2 --validation_split 0.2 --validation_steps 3 --validation_prompt 'a red creature'""",
    "perceptual_decoder": """--train_data_dir metadata/creatures --max_train_samples 12 --max_train_steps 6
        --perceptual_loss decoder --perceptual_max_timestep 600""",
    "perceptual_self": """--train_data_dir metadata/creatures --max_train_samples 12 --max_train_steps 6
        --perceptual_loss self --gradient_checkpointing --input_perturbation 0.1""",
    "schedulefree": """--train_data_dir metadata/creatures --max_train_samples 20 --max_train_steps 12
        --optimizer schedulefree --lr_scheduler constant_with_warmup --lr_warmup_ratio 0.25
        --validation_data_dir $data/shapes/whip --validation_steps 6 --checkpointing_steps 6""",
    "adamw8bit": """--train_data_dir metadata/weapons/axe --max_train_steps 8 --use_8bit_adam
        --optimizer_args min_8bit_size=256 --adam_beta2 0.99 --adam_weight_decay 0.1 --max_grad_norm 0.1""",
    "dora": """--train_data_dir metadata/weapons/whip --max_train_steps 8 --use_dora --use_rslora --lora_dropout 0.2
        --lora_alpha 8 --init_lora_weights orthogonal --target_modules to_q to_v ff.net.2
        --lr_scheduler cosine_with_restarts --lr_num_cycles 2""",
    "two_processes": """--train_data_dir metadata/weapons --max_train_samples 12 --max_train_steps 6
        --train_batch_size 2 --gradient_accumulation_steps 2 --random_flip --lora_dropout 0.1
        --validation_split 0.1 --validation_steps 3 --validation_prompts 'a red axe' 'a blue whip' 'a spear'""",
    "resumed": """--train_data_dir metadata/weapons/axe --max_train_samples 10 --max_train_steps 6 --use_ema
        --random_flip && --train_data_dir metadata/weapons/axe --max_train_samples 10 --max_train_steps 12 --use_ema
        --random_flip""",
    "prodigy": """--train_data_dir metadata/weapons/spear --max_train_steps 10 --optimizer prodigy --learning_rate 1
        --loss_type huber --huber_c 0.05 --lr_scheduler cosine""",
    "loraplus": """--train_data_dir metadata/weapons/spear --max_train_steps 8 --loraplus_lr_ratio 16
        --debiased_estimation --timestep_sampling logit_normal --logit_mean -0.5 --timestep_range 100 900
        --lr_scheduler polynomial --lr_power 2 --target_modules to_out.0 conv1 conv2""",
    "v_prediction": """--train_data_dir metadata/weapons/trident --max_train_steps 6 --prediction_type v_prediction
        --rescale_betas_zero_snr --snr_gamma 5 --timestep_sampling mode --validation_prompt 'a red trident'""",
    "bf16": """--train_data_dir $data/tags --max_train_steps 8 --mixed_precision bf16 --long_prompts --shuffle_tags
        --tag_variations 3 --trigger_word sks --caption_prefix 'a drawing, ' --caption_suffix ', white background'
        --lr_scheduler piecewise_constant --lr_step_rules 1:4,0.1 --validation_prompt 'sks, a red axe'""",
    "kohya": """--train_data_dir metadata/creatures --max_train_samples 8 --max_train_steps 2 --output_dir $out/first
        && --train_data_dir $data/kohya --num_train_epochs 2 --lora_weights $out/first --train_batch_size 2
        --lora_alpha 2 --gradient_accumulation_steps 2 --scale_lr --learning_rate 1e-4 --random_flip""",
    "class_folders": """--train_data_dir $data/pets --config $data/run.yaml --max_train_steps 6""",
    "adafactor": """--dataset_name metadata/weapons_test --num_train_epochs 4 --train_batch_size 8
        --save_every_n_epochs 2 --optimizer adafactor --lr_scheduler linear --checkpointing_steps 4
        --checkpoints_total_limit 2""",
}
RUN_FILE = "{rank: 6, use_rslora: true, random_flip: true, target_modules: [to_k], caption_template: 'a {class}'}"


class Failed(Exception):
    """A side can't be trained, or there is none; says why."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--before", required=True, metavar="REV_OR_FOLDER", help="what to compare with: a git revision, or a checkout")
    add("--after", type=Path, default=ROOT, metavar="FOLDER", help="the other checkout; this one when not given")
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help="; ".join(RUNS))
    add("--work_dir", type=Path, default=Path(tempfile.gettempdir(), "compare_checkouts"), help="folder for the runs")
    add("--jobs", type=int, default=2, help="runs at a time")
    return parser.parse_args(argv)


def git(folder, *words):
    """What git prints, as bytes; None where it fails."""
    done = subprocess.run(["git", "--no-optional-locks", "-C", str(folder), *words], capture_output=True)
    return None if done.returncode else done.stdout.strip()


def open_before(name, temporary):
    """(folder, commit) of --before; a revision is unpacked into `temporary`, a folder with changes has no commit."""
    folder = Path(name).resolve()
    if (folder / SCRIPT).is_file():
        at_its_top = git(folder, "rev-parse", "--show-prefix") == b""
        clean = at_its_top and git(folder, "status", "--porcelain") == b""
        return folder, git(folder, "rev-parse", "HEAD").decode() if clean else None
    commit = git(ROOT, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        raise Failed(f"--before {name}: neither a folder with {SCRIPT} nor a revision that git knows.")
    with tarfile.open(fileobj=io.BytesIO(git(ROOT, "archive", commit.decode()))) as archive:
        archive.extractall(temporary, filter="data")
    return Path(temporary), commit.decode()


def make_data(work_dir):
    """A folder of pictures, masks and captions in the layouts that metadata/ lacks; its name tells its content."""
    rng, files = np.random.default_rng(0), {"run.yaml": RUN_FILE.encode()}

    def add(name, size=(64, 64), caption=None, masked=False):
        pixels, encoded = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(encoded, "png")
        files[f"{name}.png"] = encoded.getvalue()
        if masked:
            mask = Image.new("L", size, 40)
            mask.paste(255, (0, 0, size[0] // 2, size[1]))
            mask.save(encoded := io.BytesIO(), "png")
            files[f"{name}.mask.png"] = encoded.getvalue()
        if caption is not None:
            files[f"{name}.txt"] = caption.encode()

    words = shlex.split("red blue green pink gold silver round long tall dark bright stone ice fire water leaf")
    shapes = [(96, 64), (64, 64), (64, 96), (128, 64)]
    for i in range(9):  # 40 tags are more than 77 tokens
        tags = [", ".join(rng.permutation(words)[:3].tolist() + words * (i % 3)) for _ in range(2)]
        add(f"tags/{i}", (80, 64), "axe, " + "\nwhip, ".join(tags), masked=i % 3 == 0)
        add(f"shapes/{'axe' if i < 6 else 'whip'}/{i}", shapes[i % 4], f"a {words[i]} axe", masked=i % 2 == 0)
        add(f"class/{i}", shapes[i % 3])
        add(f"kohya/{'3_red axe' if i < 4 else '1_blue whip'}/{i}", (80, 64), f"a {words[i]} axe" if i < 6 else None)
        add(f"pets/{'[sks]_[axe]' if i < 6 else '[gold]_[long whip]'}/{i}")
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in files.items())).hexdigest()
    folder = work_dir / f"data-{digest[:12]}"
    work_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        for name in [name for name in files if not (folder / name).exists()]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files[name])
    return folder


def train(name, checkout, data, out):
    """Runs a run's commands in a checkout and leaves everything in the new folder `out`; raises `Failed`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON} | ENVIRONMENT
    environment["HF_DATASETS_CACHE"] = str(out / "cache" / "datasets")
    python, log = [sys.executable, *(TORCHRUN if name == "two_processes" else ())], out / "log.txt"
    for flags in RUNS[name].split("&&"):
        words = [string.Template(word).substitute(out=out, data=data) for word in shlex.split(f"{COMMON} {flags}")]
        with open(log, "ab") as stderr:
            process = subprocess.Popen(
                [*python, SCRIPT, *words], cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=stderr
            )
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                member.kill()
            raise Failed(f"no end after {TIMEOUT} s (see {log})") from None
        if process.returncode:
            said = re.sub(r"(?s)\n[^\n]*torch/distributed/elastic/.*", "", log.read_text(errors="replace"))
            raise Failed(f"{(said.strip() or 'it said nothing').splitlines()[-1]} (see {log})")


def read(path):
    """{what: value} of a file: its tensors, a picture's pixels, or the metrics that don't measure the machine."""
    if path.suffix == ".safetensors":
        return dict(sorted(load_file(path).items()))
    if path.suffix == ".png":
        return {"pixels": torch.from_numpy(np.array(Image.open(path)))}
    rows = enumerate(map(json.loads, path.read_text().splitlines()))
    return {f"row {i} {k}": v for i, row in rows for k, v in row.items() if k not in OF_THE_MACHINE}


def difference(a, b):
    """How two values differ, in words, or None: tensors by their bits, all else by value."""
    if not (torch.is_tensor(a) and torch.is_tensor(b)):
        return None if a == b else f"{a} became {b}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{tuple(a.shape)} {a.dtype} became {tuple(b.shape)} {b.dtype}"
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return None
    return f"by {(a.double() - b.double()).abs().max().item():.3g} at most"


def files_of(folder):
    """What a run left and is compared: paths below its folder, the metrics first, as they tell where it began."""
    found = [path for ending in ("metrics.jsonl", "*.safetensors", "*.png") for path in sorted(folder.rglob(ending))]
    return [path for path in (p.relative_to(folder) for p in found) if path.parts[0] != "cache"]


def compare(before, after):
    """(whether two runs left the same, what differs first or how much was compared)."""
    files, others, count = files_of(before), files_of(after), 0
    if not any(path.suffix == ".safetensors" for path in files):
        return False, "there is no LoRA"
    for path in [path for path in files if path in others]:
        a, b = read(before / path), read(after / path)
        for key in a | b:
            if key not in a or key not in b:
                return False, f"{path}: only the one {'before' if key in a else 'after'} has {key}"
            gap = difference(a[key], b[key])
            if gap is not None:
                return False, f"{path}: {key} differs: {gap}"
        count += len(a)
    for path in sorted(set(files) ^ set(others)):
        return False, f"{path} is there only {'before' if path in files else 'after'}"
    return True, f"{len(files)} files, {count} values"


def compare_run(name, before, commit, after, data, work_dir):
    """(whether a run is equal in both checkouts, the line that says so); what a commit has left is not made again."""

    def folder_of(*what):
        return work_dir / f"{name}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"

    versions = [version(package) for package in ("torch", "diffusers", "peft")]
    flags = f"{COMMON} {RUNS[name]}".split()
    outs = folder_of("before", commit or str(before), flags, data.name, versions), folder_of("after", str(after))
    times = []
    for when, checkout, out in zip(("before", "after"), (before, after), outs):
        finished, started = out / "seconds.txt", time.time()
        with FileLock(f"{out}.lock"):  # of two calls at the same time, one waits for what the other makes
            kept = when == "before" and commit is not None and finished.is_file()
            if not kept:
                try:
                    train(name, checkout, data, out)
                except Failed as error:
                    return False, f"{name:<20}FAILED {when}: {error}"
                finished.write_text(f"{time.time() - started:.0f}")
        times.append(f"{finished.read_text()} s{' (kept)' if kept else ''}")
    equal, what = compare(*outs)
    return equal, f"{name:<20}{'equal' if equal else 'DIFFERS'}: {what} ({', '.join(times)})"


def main(argv=None):
    args = parse_args(argv)
    after, work_dir = args.after.resolve(), args.work_dir.resolve()
    if not (after / SCRIPT).is_file():
        raise Failed(f"--after {after}: it holds no {SCRIPT}.")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        before, commit = open_before(args.before, temporary)
        data = make_data(work_dir)
        lines = [pool.submit(compare_run, name, before, commit, after, data, work_dir) for name in args.runs]
        try:
            for line in lines:
                print(line.result()[1], flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return 0 if all(line.result()[0] for line in lines) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on, with what --before has finished", file=sys.stderr)
        sys.exit(130)
