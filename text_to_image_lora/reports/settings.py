"""The flags of validation, sample pictures, trackers and sharing. Imports nothing heavy."""

import argparse
import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import above, at_least, between, count, filled_text, flag, hub_id, inner_folder, user_path
from ..config_file import Conflict
from ..drawing.prompts import Prompt, parse_prompt, read_prompts
from ..drawing.rows import MOST_STEPS, OPTIONS_OF_PROMPTS, SETTINGS, Drawing, check_drawing
from ..errors import InputError


TRACKERS = ("wandb", "tensorboard", "trackio")
# Options that may follow the prompt of a sample picture: all but those that need another flag of infer.py.
SAMPLE_OPTIONS = [
    name for name in dict.fromkeys(OPTIONS_OF_PROMPTS.values()) if SETTINGS[name].needs in (None, "lora")
]


class PromptLines(argparse.Action):
    """Replaces the name of a .txt file by the prompts in it."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        setattr(namespace, self.dest, read_prompts(f"--{self.dest}", values))


@dataclass(frozen=True)
class ValidationSettings:
    """Which pictures a run is validated on, and when."""

    title: ClassVar = "validation loss"
    conflicts: ClassVar = (
        Conflict(
            "validation_split", "validation_data_dir", "Pass one of --validation_split and --validation_data_dir."
        ),
        Conflict("validation_epochs", "validation_steps", clash=lambda flags: flags["validation_steps"] is not None),
        Conflict(
            "validation_split", "early_stopping_patience",
            "--early_stopping_patience needs validation pictures: add --validation_split 0.1",
            lambda flags: flags["early_stopping_patience"]
            and not (flags["validation_split"] or flags["validation_data_dir"]),
            one_way=True,
        ),
        Conflict(
            "validation_epochs", "early_stopping_patience",
            "--early_stopping_patience needs validations: add --validation_steps, or --validation_epochs 1",
            lambda flags: flags["early_stopping_patience"]
            and not (flags["validation_steps"] or flags["validation_epochs"]),
            one_way=True,
        ),
        Conflict(
            "validation_split", "max_drift", "--max_drift needs validation pictures: add --validation_split 0.1",
            lambda flags: flags["max_drift"] and not (flags["validation_split"] or flags["validation_data_dir"]),
            one_way=True,
        ),
        Conflict(
            "cache_variations", "check_captions",
            "--check_captions needs pictures in the cache: leave out --cache_variations 0",
            lambda flags: flags["check_captions"] and flags["cache_variations"] == 0,
        ),
    )  # fmt: skip
    # fmt: off
    validation_split: float = flag(0.0, "fraction of the pictures to hold out from training, to detect overfitting; pictures that look alike are kept together", between(0, 0.5), may_change=True)
    validation_data_dir: tuple[str, ...] | None = flag(None, "folders of validation pictures, laid out as in --train_data_dir", user_path, nargs="+", metavar="FOLDER", may_change=True)
    validation_epochs: int = flag(1, "validate every N epochs (0: never), and always before training and at its end", count(0), may_change=True)
    validation_steps: int | None = flag(None, "validate every N optimizer steps; overrides --validation_epochs", count(1), may_change=True)
    max_drift: float | None = flag(None, "keep a step as the best only if its drift is at most this: how much its predictions differ from the base model's for captions without the concept, as a fraction of the base model's loss (default: no limit)", above(0), may_change=True)
    check_captions: bool = flag(False, "list in report.html the training pictures whose caption fits them much less well than the others fit theirs, and may be wrong; measured when each picture has been seen three times", may_change=True)
    early_stopping_patience: int | None = flag(None, "stop after N validations in a row whose loss is not the lowest so far (default: never); the best LoRA is always kept in best/", count(1), may_change=True)
    # fmt: on

    @property
    def validates(self) -> bool:
        """Whether the run has validation pictures."""
        return bool(self.validation_split or self.validation_data_dir)

    def due_after(self, step: int, steps_per_epoch: int) -> bool:
        """Returns whether the run is to be validated after an optimizer step."""
        if self.validation_steps:
            return step % self.validation_steps == 0
        epoch, into_epoch = divmod(step, steps_per_epoch)
        return bool(self.validation_epochs) and into_epoch == 0 and epoch % self.validation_epochs == 0


@dataclass(frozen=True)
class SampleSettings:
    """Which sample pictures are drawn while training, and how."""

    title: ClassVar = "sample pictures"
    # fmt: off
    validation_prompt: str | None = flag(None, "prompt for sample pictures that are drawn at each validation", may_change=True)
    validation_prompts: tuple[Prompt, ...] = flag((), "prompts for sample pictures that are drawn at each validation, or a .txt file with one prompt per line; options may follow each prompt: a red axe --seed 3 --width 768 --negative blurry (also --steps, --guidance, --height, --scheduler, --lora_scale, and kohya's --n --w --h --d --l --s)", nargs="+", action=PromptLines, metavar="PROMPT", may_change=True)
    validation_negative_prompt: str = flag("", "negative prompt for the sample pictures", may_change=True)
    num_validation_images: int = flag(4, "number of sample pictures per prompt; 0: draw none", count(0, 1000), may_change=True)
    validation_guidance_scale: float = flag(7.5, "classifier-free guidance scale for the sample pictures; higher values follow the prompt more closely", at_least(0), may_change=True)
    validation_inference_steps: int = flag(30, "number of denoising steps for the sample pictures", between(1, MOST_STEPS, int), may_change=True)
    # fmt: on

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """All prompts for sample pictures."""
        if not self.num_validation_images:
            return []
        own = [] if self.validation_prompt is None else [parse_prompt(self.validation_prompt, "--validation_prompts")]
        return [*own, *self.validation_prompts]

    @property
    def texts(self) -> list[str]:
        """The prompts without their options."""
        return [prompt.text for prompt in self.prompts]

    def check(self, settings):
        if any(not prompt.text.strip() for prompt in self.prompts):
            raise InputError("--validation_prompt is empty: describe the picture, or leave the flag out.")
        unknown = [name for prompt in self.prompts for name in prompt.options if name not in SAMPLE_OPTIONS]
        if unknown:
            listed = ", ".join(f"--{name}" for name in SAMPLE_OPTIONS)
            raise InputError(
                f"--{unknown[0]} after a prompt works only in infer.py. Sample pictures support {listed}."
            )
        last = max(self.num_validation_images - 1, 0)
        for prompt in self.prompts:
            options: dict[str, Any] = {"num_inference_steps": self.validation_inference_steps} | prompt.options
            check_drawing(Drawing(**options | {"seed": prompt.options.get("seed", 0) + last}))


@dataclass(frozen=True)
class TrackingSettings:
    """Where metrics and sample pictures are logged."""

    title: ClassVar = "tracking"
    conflicts: ClassVar = (
        Conflict(
            "report_to", "trackio_space_id", "--trackio_space_id needs trackio: add --report_to trackio.",
            lambda flags: flags["trackio_space_id"] is not None and flags["report_to"] not in ("trackio", "all"),
            one_way=True,
        ),
    )  # fmt: skip
    # fmt: off
    report_to: str | None = flag(None, "tracker that logs metrics and sample pictures (default: wandb if it is installed, offline without an API key or a network)", choices=[*TRACKERS, "all", "none"], may_change=True)
    debug_loss: bool = flag(False, "also log the loss of each picture at each training step, as loss_for_ and its file name", may_change=True)
    tracker_project_name: str = flag("text2image-fine-tune", "name of the project in the trackers", filled_text, may_change=True)
    trackio_space_id: str | None = flag(None, "hub Space for trackio's dashboard, created as a private Space (default: the dashboard stays on this machine)", hub_id, metavar="OWNER/NAME", may_change=True)
    logging_dir: str = flag("logs", "folder for TensorBoard's logs, inside --output_dir", inner_folder, may_change=True)
    # fmt: on

    @property
    def trackers(self) -> list[str]:
        """The trackers that `--report_to` selects; raises `InputError` if one is not installed."""
        specs = {name: importlib.util.find_spec(name) for name in TRACKERS}
        # A folder named like the package, such as W&B's folder of runs, has a spec without an origin.
        installed = [name for name, spec in specs.items() if spec is not None and spec.origin is not None]
        if self.report_to is None:
            return ["wandb"] if "wandb" in installed else []
        if self.report_to == "none":
            return []
        if self.report_to == "all":
            return installed
        if self.report_to not in installed:
            how = "--no-deps -r requirements-trackio.txt" if self.report_to == "trackio" else self.report_to
            raise InputError(f"--report_to {self.report_to}: it is not installed. Run: pip install {how}")
        return [self.report_to]


@dataclass(frozen=True)
class SharingSettings:
    """What is uploaded to the Hugging Face Hub."""

    title: ClassVar = "sharing"
    # fmt: off
    push_to_hub: bool = flag(False, "upload the LoRA, its model card and sample pictures to the hub at the end of training", may_change=True)
    push_checkpoints_to_hub: bool = flag(False, "upload each checkpoint during training to a hub repository, created as private; another machine resumes from it with --resume_from_checkpoint hf://...", may_change=True)
    hub_token: str | None = flag(None, "hub token for uploads; hf auth login is safer", may_change=True, secret=True)
    hub_model_id: str | None = flag(None, "hub repository to upload to (default: the name of the output folder)", filled_text, may_change=True)
    # fmt: on

    @property
    def uploads(self) -> bool:
        return self.push_to_hub or self.push_checkpoints_to_hub

    def repository(self, output_dir: str) -> str:
        return self.hub_model_id or Path(output_dir).resolve().name

    def check(self, settings):
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        for name in ("push_to_hub", "push_checkpoints_to_hub"):
            if getattr(self, name) and offline:
                raise InputError(
                    f"--{name} does not work with HF_HUB_OFFLINE set: unset it, or upload later with `hf upload`."
                )
