"""The flags of what a run reports: validation, sample pictures, trackers, sharing. Imports nothing heavy."""

import argparse
import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..command_line import at_least, between, flag, hub_id
from ..drawing.prompts import Prompt, parse_prompt, read_prompts
from ..errors import InputError


TRACKERS = ("wandb", "tensorboard", "trackio")
# What may stand behind the prompt of a sample picture.
SAMPLE_OPTIONS = ("negative_prompt", "seed", "num_inference_steps", "guidance_scale", "height", "width")


class PromptLines(argparse.Action):
    """Puts the prompts in a file in its place."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, read_prompts(option_string, values))


@dataclass(frozen=True)
class ValidationSettings:
    """The pictures that are not trained on, and when a run is validated."""

    title: ClassVar = "validation loss"
    # fmt: off
    validation_split: float = flag(0.0, "share of the pictures that are not trained on, to tell learning from overfitting; pictures that look alike stay together", between(0, 0.5), may_change=True)
    validation_data_dir: tuple[str, ...] | None = flag(None, "pictures to validate on in folders of their own, laid out as in --train_data_dir", nargs="+", metavar="FOLDER", may_change=True)
    validation_epochs: int = flag(1, "validate every so many epochs, before training and at the end; 0: only before and at the end", at_least(0), may_change=True)
    validation_steps: int | None = flag(None, "validate every so many optimizer steps, instead of --validation_epochs", at_least(1), may_change=True)
    early_stopping_patience: int | None = flag(None, "stop when so many validations in a row were no better; the best LoRA is in best/ in any case", at_least(1), may_change=True)
    # fmt: on

    def due_after(self, step: int, steps_per_epoch: int) -> bool:
        """Whether the run is to be validated after an optimizer step."""
        if self.validation_steps:
            return step % self.validation_steps == 0
        epoch, into_epoch = divmod(step, steps_per_epoch)
        return bool(self.validation_epochs) and into_epoch == 0 and epoch % self.validation_epochs == 0

    def check(self, settings):
        if self.validation_split and self.validation_data_dir:
            raise InputError("Pass one of --validation_split and --validation_data_dir.")
        if self.early_stopping_patience and not (self.validation_split or self.validation_data_dir):
            raise InputError("--early_stopping_patience needs pictures to judge by: add --validation_split 0.1")
        if self.early_stopping_patience and not (self.validation_steps or self.validation_epochs):
            raise InputError(
                "--early_stopping_patience needs validations: add --validation_steps, or --validation_epochs 1"
            )


@dataclass(frozen=True)
class SampleSettings:
    """The pictures that are drawn while training."""

    title: ClassVar = "sample pictures"
    # fmt: off
    validation_prompt: str | None = flag(None, "a prompt to draw sample pictures with while training", may_change=True)
    validation_prompts: tuple[Prompt, ...] = flag((), "several prompts to draw sample pictures with while training, or a .txt file with one a line; options may stand behind each: a red axe --seed 3 --width 768 --negative blurry (also --steps, --guidance, --height, and kohya's --n --w --h --d --l --s)", nargs="+", action=PromptLines, metavar="PROMPT", may_change=True)
    validation_negative_prompt: str = flag("", "what the sample pictures are to avoid", may_change=True)
    num_validation_images: int = flag(4, "sample pictures of each prompt; 0: none", at_least(0), may_change=True)
    validation_guidance_scale: float = flag(7.5, "how strictly the sample pictures follow their prompt (classifier-free guidance)", at_least(0, float), may_change=True)
    validation_inference_steps: int = flag(30, "denoising steps of the sample pictures", at_least(1), may_change=True)
    # fmt: on

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts that sample pictures are drawn of."""
        if not self.num_validation_images:
            return []
        own = [] if self.validation_prompt is None else [parse_prompt(self.validation_prompt, "--validation_prompts")]
        return [*own, *self.validation_prompts]

    @property
    def texts(self) -> list[str]:
        """The texts of `prompts`, without their options."""
        return [prompt.text for prompt in self.prompts]

    def check(self, settings):
        if any(not prompt.text.strip() for prompt in self.prompts):
            raise InputError("--validation_prompt is empty: write what the picture shows, or leave the flag out.")
        alien = [name for prompt in self.prompts for name in prompt.options if name not in SAMPLE_OPTIONS]
        if alien:
            listed = ", ".join(f"--{name}" for name in SAMPLE_OPTIONS)
            raise InputError(f"--{alien[0]} behind a prompt is for infer.py alone. Sample pictures have {listed}.")


@dataclass(frozen=True)
class TrackingSettings:
    """Where the numbers and pictures of a run go."""

    title: ClassVar = "tracking"
    # fmt: off
    report_to: str | None = flag(None, "where metrics and sample pictures go; wandb when it is installed (offline without key or network)", choices=[*TRACKERS, "all", "none"], may_change=True)
    debug_loss: bool = flag(False, "report the loss of each picture in each step too, as loss_for_ and the name of its file", may_change=True)
    tracker_project_name: str = flag("text2image-fine-tune", "the project's name in the trackers", may_change=True)
    trackio_space_id: str | None = flag(None, "the hub Space that trackio's dashboard runs in, private when it is made; on this machine when not given", hub_id, metavar="OWNER/NAME", may_change=True)
    logging_dir: str = flag("logs", "TensorBoard's folder, inside --output_dir", may_change=True)
    # fmt: on

    @property
    def trackers(self) -> list[str]:
        """The names of the trackers that `--report_to` means; `InputError` for one that is not installed."""
        specs = {name: importlib.util.find_spec(name) for name in TRACKERS}
        # A mere folder of that name, such as the one that W&B writes its runs to, has a spec without origin.
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

    def check(self, settings):
        if self.trackio_space_id is not None and self.report_to not in ("trackio", "all"):
            raise InputError("--trackio_space_id says where trackio's dashboard runs: add --report_to trackio.")


@dataclass(frozen=True)
class SharingSettings:
    """What is uploaded to the hub."""

    title: ClassVar = "sharing"
    # fmt: off
    push_to_hub: bool = flag(False, "upload the LoRA, its model card and sample pictures at the end", may_change=True)
    push_checkpoints_to_hub: bool = flag(False, "upload each checkpoint beside the training, into a repository that is private when it is made; --resume_from_checkpoint hf://... goes on from it on another machine", may_change=True)
    hub_token: str | None = flag(None, "token for the upload; better: hf auth login", may_change=True, secret=True)
    hub_model_id: str | None = flag(None, "repository to upload to; the output folder's name when not given", may_change=True)
    # fmt: on

    @property
    def uploads(self) -> bool:
        return self.push_to_hub or self.push_checkpoints_to_hub

    def repository(self, output_dir: str) -> str:
        """The repository to upload to."""
        return self.hub_model_id or Path(output_dir).resolve().name

    def check(self, settings):
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        for name in ("push_to_hub", "push_checkpoints_to_hub"):
            if getattr(self, name) and offline:
                raise InputError(
                    f"--{name} can't work with HF_HUB_OFFLINE set: unset it, or upload later with `hf upload`."
                )
