#!/usr/bin/env python
"""Scores LoRAs or checkpoints by the pictures that they draw, and recommends one of them.

    python scripts/evaluate.py --pretrained_model_name_or_path models/mini-sd --lora "demo/blossoms/epoch-*" demo/blossoms \\
        --validation_data_dir metadata/weapons_test --train_data_dir metadata/weapons --trigger_word "with pink blossoms"

The scores are explained in docs/evaluation.md. To resume a stopped evaluation, run the same command again: pictures that
were already drawn are kept.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout
from text_to_image_lora.signals import exit_on_signals


if __name__ == "__main__":
    # Before the slow imports, or else a signal would end them with a traceback.
    exit_on_signals("run the same command again to resume")

import functools
import json
import time
from typing import NamedTuple

from scripts.evaluation import report
from scripts.evaluation.inputs import find_inputs, images_of
from scripts.evaluation.judges import CLIP_MODEL, DINO_MODEL, Seen, describe_misfit
from scripts.evaluation.pictures import draw_all, make_drawings, make_loss_meter, picture_folder
from text_to_image_lora import log
from text_to_image_lora.command_line import Parser, between, count, user_path
from text_to_image_lora.drawing.identities import loading_unchanged
from text_to_image_lora.drawing.pipeline import choose_device, open_studio, set_loras
from text_to_image_lora.drawing.png import source_of
from text_to_image_lora.drawing.rows import SETTINGS, Drawing, sampler_name
from text_to_image_lora.drawing.settings import BATCH_SIZE, FromPictures, Machine
from text_to_image_lora.errors import InputError, TrainingError, explaining_system_errors
from text_to_image_lora.libraries import quiet_libraries, set_num_threads
from text_to_image_lora.locks import alone_in


class Drawn(NamedTuple):
    """The judge's results for the pictures that a LoRA drew, and the LoRA's losses on the held-out pictures."""

    seen: Seen  # in the order of the prompts, with consecutive seeds
    losses: list  # of shape (held-out pictures, timesteps)


def build_parser():
    parser = Parser(description=__doc__.splitlines()[0], epilog=" ".join(__doc__.split("\n\n")[-1].split()))
    # fmt: off
    group = parser.add_argument_group("models").add_argument
    group("--pretrained_model_name_or_path", type=user_path, required=True, metavar="MODEL", help="base model: local folder, hub id, .safetensors or .ckpt file")
    group("--lora", type=user_path, nargs="+", required=True, metavar="LORA", help="LoRAs or checkpoints, each as PATH or PATH:STRENGTH; patterns such as \"run/epoch-*\" are sorted by the numbers in the names")
    group("--revision", help="branch, tag or commit of a base model on the hub")
    group("--variant", help="variant of the base model's weight files to load, such as fp16")
    group("--single_file_config", type=user_path, metavar="FOLDER", help="pipeline folder that configures a single-file base model offline")
    group("--vae", type=user_path, metavar="MODEL", help="VAE that replaces the base model's (default: the VAE that the LoRA was trained with)")

    group = parser.add_argument_group("data").add_argument
    group("--validation_data_dir", type=user_path, nargs="+", metavar="FOLDER", help="captioned pictures that no LoRA was trained on: their captions are the prompts, and the drawn pictures are compared with them")
    group("--validation_split", type=between(0, 0.5), default=0.0, help="fraction of --train_data_dir that was held out in training; use instead of --validation_data_dir")
    group("--train_data_dir", type=user_path, nargs="+", metavar="FOLDER", help="training pictures, to measure whether they were memorised")
    group("--trigger_word", help="word or words that call the concept in the captions; without them in a prompt, the concept should not be drawn")
    group("--other_prompts", nargs="+", metavar="PROMPT", help="prompts for other things, which should be drawn as by the base model, or a .txt file with one prompt per line (default: eight everyday things)")
    group("--instance_prompt", help="caption for pictures that have none")
    group("--caption_column", help="column with the captions (default: detected)")
    group("--concept_column", help="column with the concept of each picture (default: the name of its folder)")

    group = parser.add_argument_group("pictures").add_argument
    group("--num_prompts", type=count(1), default=12, help="number of captions to draw, evenly spaced among the held-out pictures")
    group("--num_images", type=count(3), default=3, help="pictures per prompt, 3 or more, each with its own seed")
    group("--seed", type=between(0, 2**63 - 1, int), default=0, help="random seed; picture k of each prompt uses seed + k (default: 0)")
    group("--resolution", type=count(8), help="side in pixels of the pictures that are drawn and compared (default: the resolution of the base model)")
    group("--num_inference_steps", type=SETTINGS["num_inference_steps"].parse, metavar="N", default=30, help="denoising steps")
    group("--guidance_scale", type=SETTINGS["guidance_scale"].parse, metavar="X", default=7.5, help="classifier-free guidance scale: how strictly the prompts are followed")
    group("--scheduler", type=sampler_name, metavar="NAME", help="sampler, as in infer.py (default: the base model's, with dpm++ in place of pndm)")

    group = parser.add_argument_group("judges").add_argument
    group("--judge", choices=["clip", "mini-sd"], help="what scores the pictures: CLIP and DINOv2, or judges for the drawings of models/mini-sd (default: mini-sd for models/mini-sd, otherwise clip)")
    group("--clip_model", type=user_path, default=CLIP_MODEL, metavar="MODEL", help="CLIP model in transformers format: hub id or folder")
    group("--dino_model", type=user_path, default=DINO_MODEL, metavar="MODEL", help="DINOv2 model in transformers format: hub id or folder")

    group = parser.add_argument_group("machine").add_argument
    group("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the models (default: bf16 on CUDA, otherwise no)")
    group("--device", help="cpu, cuda, cuda:1 or mps (default: the fastest available)")
    group("--batch_size", type=count(1), help=f"pictures per batch (default: {BATCH_SIZE})")
    group("--num_cpu_threads", type=count(1), help="threads for computing on a CPU (default: OMP_NUM_THREADS, or else the number of physical cores that are not busy)")
    group("--output_dir", type=Path, default=Path("evaluation"), help="folder for the tables, sheets and pictures")
    # fmt: on
    return parser


def draw_and_look(args, inputs):
    """Returns {label: `Drawn`} of the base model and the LoRAs; pictures that were already drawn are kept."""
    as_trained, side = inputs.job.as_trained, inputs.resolution
    machine = Machine(
        batch_size=args.batch_size, mixed_precision=args.mixed_precision, device=args.device or "auto",
        num_cpu_threads=args.num_cpu_threads,
    )  # fmt: skip
    device, dtype = choose_device(machine.device, machine.mixed_precision)
    if device == "cpu":
        set_num_threads(machine.num_cpu_threads)
    with loading_unchanged(inputs.job.base.model, inputs.job.loras, as_trained.vae) as identities:
        studio = open_studio(inputs.job, machine, device, dtype)
    inputs.judge.load(device)
    held_out = inputs.judge.look(images_of(inputs.held_out), inputs.captions(), {})
    if (misfit := describe_misfit(inputs.judge, held_out)) is not None:
        print(f"note: {misfit}", flush=True)
    # The LoRAs' headers determine together how all pictures are drawn, also those of the base model.
    identities |= {"as_trained": json.dumps(as_trained)}
    source = source_of(
        inputs.model, FromPictures(), vae=as_trained.vae, dtype=dtype, device=device, compiled=machine.compile,
        identities=identities,
    )  # fmt: skip
    like = Drawing(
        seed=args.seed, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
        scheduler=args.scheduler, clip_skip=as_trained.clip_skip or 0, height=side, width=side,
    )  # fmt: skip
    measure = make_loss_meter(
        studio, inputs.job.base.model, inputs.held_out, device=device, folder=args.output_dir / "cache", seed=args.seed
    )
    prompts = [each.prompt for each in inputs.asked for _ in range(args.num_images)]
    references, found = inputs.references(), {}
    for number, (label, lora) in enumerate(inputs.loras.items(), 1):
        say = functools.partial(print, f"{number}/{len(inputs.loras)} {label}:", flush=True)
        drawings = make_drawings(inputs.asked, lora, like, args.num_images)
        folder = picture_folder(args.output_dir, label)
        images, reused = draw_all(studio, drawings, folder, source, machine.batch_size or BATCH_SIZE, say)
        say(f"drew {len(images) - reused} pictures ({reused} were already there)")
        set_loras(studio.pipe, drawings[0].active_loras())
        found[label] = Drawn(inputs.judge.look(images, prompts, references), measure())
    return found


def main(args):
    started = time.time()
    log.start(warning_format="note: %(message)s")
    quiet_libraries()
    with alone_in(args.output_dir, "--output_dir"):
        evaluate(args, started)


def evaluate(args, started):
    """Evaluates the LoRAs; no other process writes into the output folder meanwhile."""
    inputs = find_inputs(args)
    print(
        f"{len(inputs.loras) - 1} LoRAs and the base model: {len(inputs.asked)} prompts x {args.num_images} seeds each, "
        f"{len(inputs.held_out)} held-out pictures", flush=True
    )  # fmt: skip
    for line in report.describe_equal_loras(inputs.loras):
        print(f"note: {line}", flush=True)
    drawn = draw_and_look(args, inputs)
    print("\n" + report.write(args, inputs, drawn))
    print(f"\nwrote evaluation.md, evaluation.json and pictures to {args.output_dir} ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    try:
        with explaining_system_errors():
            main(build_parser().parse_args())
    except (InputError, TrainingError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
