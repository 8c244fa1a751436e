#!/usr/bin/env python
"""Times whole commands: steps of training, beside another script with the same flags; and datasets of many pictures.

    python scripts/benchmark.py --resolution 256 --mixed_precision bf16 --baseline PATH/TO/train_text_to_image_lora.py
    python scripts/benchmark.py --count_kernels --mixed_precision bf16 --baseline PATH/TO/train_text_to_image_lora.py
    python scripts/benchmark.py --dataset_sizes 1000 10000 100000

Steps are of Stable Diffusion v1.5's geometry (random weights). Each script is run short and long, in turn: seconds a
step is the difference over the steps between, so that imports, loading and caching count for the start and not for the
step. Operators are counted in a step of either script, on any device: at batch 1 a GPU waits for each to be launched.
Views launch nothing and are not counted, nor is what the data loader does. Datasets are small pictures for the embedded base: a --dry_run, a run of one step that encodes them, and another
that finds them in the cache. Machines are noisy: read the ratios.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset_sizes", type=int, nargs="+", help="time datasets of so many 64x64 pictures instead of steps")
    add("--count_kernels", action="store_true", help="count the operators of a step instead of timing steps")
    add("--model", type=Path, help="a diffusers folder; SD1.5's geometry with random weights is made when not given")
    add("--baseline", type=Path, help="another training script that takes the diffusers example's flags")
    add(
        "--baseline_flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="flags for the baseline alone (last on the line)",
    )
    add("--resolution", type=int, default=512, help="side of the pictures")
    add("--train_batch_size", type=int, default=1, help="pictures a step")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of the frozen base")
    add("--rank", type=int, default=16, help="of the LoRA; the baseline adapts what it adapts")
    add("--short", type=int, default=2, help="steps of the short run")
    add("--long", type=int, default=8, help="steps of the long run")
    add("--repeats", type=int, default=2, help="how often each is run")
    add("--work_dir", type=Path, help="keep the model and the pictures here")
    return parser.parse_args(argv)


def make_sd15(folder):
    """A pipeline folder of SD1.5's configuration with random weights in float16, about 2 GB."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from mini_sd import make_pipeline, write_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    write_tokenizer(folder.with_name("words"))
    tokenizer = CLIPTokenizer.from_pretrained(folder.with_name("words"))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    make_pipeline(vae, unet, text_encoder, tokenizer).to("cpu", torch.float16).save_pretrained(folder)
    return folder


def make_pictures(folder, resolution, count=8, ending="png"):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as file:
        for i in range(count):
            pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            pixels.resize((resolution, resolution), Image.Resampling.BICUBIC).save(folder / f"{i}.{ending}")
            file.write(json.dumps({"file_name": f"{i}.{ending}", "text": f"picture number {i}"}) + "\n")
    return folder


def run(command, env):
    """Wall seconds, peak memory, and the most of its last third (GiB of the CPU's); output is shown where it fails.

    While models are loaded more memory is taken than by the steps, which are what the last third of a long run does.
    """
    import psutil

    started, samples = time.time(), []
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([str(c) for c in command], stdout=log, stderr=subprocess.STDOUT, env=env)
        watched = psutil.Process(process.pid)
        while (waited := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            samples.append((time.time() - started, watched.memory_info().rss / 2**30))
            time.sleep(0.05)
        _, status, usage = waited
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\n{log.read().decode()[-4000:]}")
    took = time.time() - started
    return took, usage.ru_maxrss / 2**20, max(rss for at, rss in samples if at >= samples[-1][0] * 2 / 3)


def time_datasets(args, work):
    """Seconds and peak memory of each command on each dataset, and what each further picture cost."""
    kinds = {"--dry_run": ["--dry_run"], "first run": [], "second run": []}
    measured, env = {}, os.environ | {"HF_HUB_OFFLINE": "1"}
    for count in args.dataset_sizes:
        pictures, output = work / f"pictures-{count}", work / f"out-{count}"
        print(f"making {count} pictures", flush=True)
        make_pictures(pictures, 64, count, "jpg")
        shutil.rmtree(work / f"cache-{count}", ignore_errors=True)
        for kind, flags in kinds.items():
            shutil.rmtree(output, ignore_errors=True)
            command = [
                sys.executable, ROOT / "train_text_to_image_lora.py", "--pretrained_model_name_or_path",
                args.model or ROOT / "models" / "mini-sd", "--train_data_dir", pictures, "--resolution", 64, "--center_crop",
                "--max_train_steps", 1, "--report_to", "none", "--seed", 0, "--output_dir", output,
                "--latent_cache_dir", work / f"cache-{count}", *flags,
            ]  # fmt: skip
            measured[kind, count] = run(command, env)[:2]
            print(f"{count} pictures, {kind}: {measured[kind, count][0]:.1f} s", flush=True)
    print("\n| command | pictures | s | ms for each further picture | peak memory (GiB) |\n|---|---|---|---|---|")
    for kind in kinds:
        before = None
        for count in args.dataset_sizes:
            seconds, peak = measured[kind, count]
            each = "" if before is None else f"{1000 * (seconds - before[1]) / (count - before[0]):.2f}"
            print(f"| {kind} | {count:,} | {seconds:.1f} | {each} | {peak:.2f} |")
            before = count, seconds


# Runs a script with its flags, and prints what operators its last step dispatched. The loader's are left out: they
# are the CPU's, ahead of the step.
COUNTING = """
import collections, json, os, runpy, sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

def launches(function):
    returns = [returned.alias_info for returned in function._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in returns)
    return not view and function.overloadpacket.__name__ not in NOTHING

NOTHING = {"_unsafe_view", "detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh",
           "is_same_size", "resize_", "_record_function_enter_new", "_record_function_exit"}

class Counter(TorchDispatchMode):
    loading = False
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.loading and launches(function):
            counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

def load(self, inner=torch.utils.data.dataloader._BaseDataLoaderIter.__next__):
    counter.loading = True
    try:
        return inner(self)
    finally:
        counter.loading = False

def end_of_step(*_):
    steps.append(dict(counts))
    counts.clear()

counter, counts, steps = Counter(), collections.Counter(), []
torch.utils.data.dataloader._BaseDataLoaderIter.__next__ = load
register_optimizer_step_post_hook(end_of_step)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
with counter:
    runpy.run_path(sys.argv[0], run_name="__main__")
print("COUNTED " + json.dumps(steps[-1]))
"""


def main(args):
    work = args.work_dir or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    if args.dataset_sizes:
        time_datasets(args, work)
    elif args.count_kernels:
        count_kernels(args, work)
    else:
        time_steps(args, work)


def prepared(args, work):
    """(model, pictures, {runner: (script, flags of its own)}, environment) of what is to be compared."""
    model = args.model or work / "sd15"
    if not (model / "model_index.json").exists():
        print(f"making {model}", flush=True)
        make_sd15(model)
    pictures = make_pictures(work / f"pictures-{args.resolution}", args.resolution)
    scripts = {
        "ours": (ROOT / "train_text_to_image_lora.py", ["--latent_cache_dir", work / "cache", "--report_to", "none"])
    }
    if args.baseline is not None:
        scripts["baseline"] = (args.baseline, args.baseline_flags)
    return model, pictures, scripts, os.environ | {"HF_HUB_OFFLINE": "1"}


def training_flags(args, model, pictures, steps, output):
    return [
        "--pretrained_model_name_or_path", model, "--train_data_dir", pictures, "--resolution", args.resolution,
        "--center_crop", "--train_batch_size", args.train_batch_size, "--max_train_steps", steps, "--mixed_precision",
        args.mixed_precision, "--rank", args.rank, "--checkpointing_steps", 100000, "--seed", 0, "--output_dir", output,
    ]  # fmt: skip


def count_kernels(args, work):
    """The operators that a step dispatches, by kind, of our script and of the baseline."""
    model, pictures, scripts, env = prepared(args, work)
    counted = {}
    for name, (script, flags) in scripts.items():
        output = work / f"out-{name}"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-c", COUNTING, script, *training_flags(args, model, pictures, 3, output), *flags]
        done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("COUNTED ")]
        if not lines:
            sys.exit(f"{script}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        counted[name] = json.loads(lines[0].removeprefix("COUNTED "))
    kinds = sorted({kind for counts in counted.values() for kind in counts}, key=lambda k: -counted["ours"].get(k, 0))
    print(f"| operator | {' | '.join(counted)} |\n|---|{'---|' * len(counted)}")
    print(f"| all | {' | '.join(f'{sum(counts.values()):,}' for counts in counted.values())} |")
    for kind in kinds[:15]:
        print(f"| `{kind}` | {' | '.join(str(counts.get(kind, 0)) for counts in counted.values())} |")


def time_steps(args, work):
    """Seconds a step and peak memory of our script, and of the baseline beside it."""
    model, pictures, scripts, env = prepared(args, work)
    seconds = {name: {args.short: [], args.long: []} for name in scripts}
    peak, in_steps = dict.fromkeys(scripts, 0.0), dict.fromkeys(scripts, 0.0)
    # Once before, untimed: it fills our cache and the system's, which a later run finds filled.
    for turn, steps in enumerate([args.short] + [args.short, args.long] * args.repeats):
        for name, (script, flags) in scripts.items():
            output = work / f"out-{name}"
            shutil.rmtree(output, ignore_errors=True)
            command = [sys.executable, script, *training_flags(args, model, pictures, steps, output), *flags]
            took, most, late = run(command, env)
            peak[name] = max(peak[name], most)
            if steps == args.long:
                in_steps[name] = max(in_steps[name], late)
            print(f"{name}: {steps} steps in {took:.1f} s, {most:.2f} GiB{'' if turn else ' (first)'}", flush=True)
            if turn:
                seconds[name][steps].append(took)
    print("\n| script | s/step | start (s) | memory in the steps (GiB) | peak memory (GiB) |\n|---|---|---|---|---|")
    per_step = {}
    for name, times in seconds.items():
        short, long = min(times[args.short]), min(times[args.long])
        per_step[name] = (long - short) / (args.long - args.short)
        start = short - args.short * per_step[name]
        print(f"| {name} | {per_step[name]:.2f} | {start:.1f} | {in_steps[name]:.2f} | {peak[name]:.2f} |")
    if "baseline" in per_step:
        print(f"\nbaseline / ours: {per_step['baseline'] / per_step['ours']:.2f}")


if __name__ == "__main__":
    main(parse_args())
