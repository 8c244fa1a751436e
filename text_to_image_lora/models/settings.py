"""The flags of the base model and of the LoRA. Imports nothing heavy."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import above, count, flag, from_up_to, user_path
from ..config_file import Conflict
from ..errors import InputError
from ..files import check_regular


MOST_CHUNKS = 10  # per prompt; more would take too much memory and time in each step


@dataclass(frozen=True)
class BaseModelSettings:
    """The model that is fine-tuned."""

    title: ClassVar = "base model"
    # fmt: off
    pretrained_model_name_or_path: str | None = flag(None, "base model, a Stable Diffusion 1, 2 or XL: hub id, local diffusers folder, or single .safetensors/.ckpt file", user_path, may_change=True)
    revision: str | None = flag(None, "branch, tag or commit of the base model on the hub", may_change=True)
    variant: str | None = flag(None, "variant of the base model's weight files, such as fp16", may_change=True)
    single_file_config: str | None = flag(None, "diffusers folder with the configuration of a base model that is a single file (default: downloaded from the hub)", user_path, metavar="FOLDER", may_change=True)
    pretrained_vae_model_name_or_path: str | None = flag(None, "VAE to use instead of that of the base model: hub id, folder or single file", user_path, may_change=True)
    clip_skip: int | None = flag(None, "number of last layers of the text encoder to skip, in training and validation", count(0))
    cache_dir: str | None = flag(None, "folder for downloaded models and datasets", user_path, may_change=True)
    # fmt: on

    def check(self, settings):
        if self.pretrained_model_name_or_path is None:
            raise InputError("--pretrained_model_name_or_path is required: a hub id, a local folder or a single file.")
        vae = self.pretrained_vae_model_name_or_path
        if vae is not None and vae.startswith((".", "/", "~")) and not Path(vae).exists():
            raise InputError(f"{vae}: there is no such file or folder (--pretrained_vae_model_name_or_path).")
        if vae is not None:
            check_regular(vae, "--pretrained_vae_model_name_or_path")


@dataclass(frozen=True)
class LoraSettings:
    """The adapters and their files."""

    title: ClassVar = "LoRA"
    conflicts: ClassVar = (
        *(
            Conflict(
                "train_text_encoder", name,
                f"--{name} requires a text encoder that is trained: add --train_text_encoder.",
                lambda flags, name=name: flags[name] is not None and not flags["train_text_encoder"], one_way=True,
            )
            for name in ("text_encoder_rank", "text_encoder_lr")
        ),
        Conflict(
            "output_kohya_format", "kohya_extras",
            "--kohya_extras applies to the file in kohya's format: add --output_kohya_format.",
            lambda flags: flags["kohya_extras"] and not flags["output_kohya_format"], one_way=True,
        ),
    )  # fmt: skip
    # fmt: off
    rank: int = flag(4, "dimension of the update matrices", count(1))
    lora_alpha: float | None = flag(None, "the update of the LoRA is scaled by alpha / rank (default: the rank)", above(0))
    lora_dropout: float = flag(0.0, "dropout probability before the update matrices", from_up_to(0, 1))
    target_modules: tuple[str, ...] | None = flag(None, "layers to adapt, by the ends of their names (default: all attention and feed-forward layers)", nargs="+", metavar="NAME")
    init_lora_weights: str = flag("gaussian", "initialization of the update matrices: true (Kaiming), gaussian or orthogonal")
    use_rslora: bool = flag(False, "rank-stabilized LoRA: scale the update by alpha / sqrt(rank)")
    use_dora: bool = flag(False, "weight-decomposed LoRA (DoRA)")
    lora_weights: str | None = flag(None, "LoRA file or folder to start from", user_path, metavar="PATH")
    train_text_encoder: bool = flag(False, "also train a LoRA of the text encoder (of both for Stable Diffusion XL); captions are then encoded in each step")
    text_encoder_rank: int | None = flag(None, "rank of the LoRA of the text encoder (default: --rank)", count(1))
    output_kohya_format: bool = flag(False, "also write the LoRA in kohya's format, for A1111, ComfyUI, Forge and InvokeAI; the file is named after --output_dir", may_change=True)
    kohya_extras: tuple[str, ...] = flag((), "information about your pictures in the kohya file; thumbnail: the last sample picture; tags: the counts of the tags in the captions", nargs="+", choices=["thumbnail", "tags"], may_change=True)
    # fmt: on

    @property
    def alpha(self) -> float:
        """The LoRA alpha; the update is scaled by alpha / rank."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def needs_autocast(self) -> bool:
        """Whether peft computes the adapters, in float32, instead of the lean forward in the precision of the base."""
        return bool(self.lora_dropout or self.use_dora)

    def of_denoiser(self, family: Any) -> "LoraSettings":
        """Returns the settings for the denoiser, with the layers of the `Family` if no layers are set."""
        return dataclasses.replace(self, target_modules=tuple(self.target_modules or family.target_modules))

    def of_text_encoder(self, layers: Sequence[str]) -> "LoraSettings":
        """Returns the settings for the text encoder and these layers, with its rank and the same alpha / rank."""
        rank = self.text_encoder_rank or self.rank
        alpha = self.alpha * rank / self.rank
        return dataclasses.replace(self, rank=rank, lora_alpha=alpha, target_modules=tuple(layers))

    def check(self, settings):
        if self.init_lora_weights not in ("true", "gaussian", "orthogonal"):
            rewrites = self.init_lora_weights.startswith(("pissa", "olora", "corda", "loftq"))
            reason = (
                " It changes the base model, so the saved file would be wrong for the original base model."
                if rewrites
                else ""
            )
            raise InputError(
                f"--init_lora_weights {self.init_lora_weights}: choose true, gaussian or orthogonal.{reason}"
            )
        ranks = [rank for rank in (self.rank, self.text_encoder_rank) if rank is not None]
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            raise InputError(
                f"--init_lora_weights orthogonal needs an even rank, not {' and '.join(map(str, ranks))}."
            )
        if self.lora_weights is not None and not Path(self.lora_weights).exists():
            raise InputError(f"{self.lora_weights}: there is no such file or folder (--lora_weights).")
        if "thumbnail" in self.kohya_extras and not settings.samples.prompts:
            raise InputError("--kohya_extras thumbnail requires sample pictures: add --validation_prompt.")
