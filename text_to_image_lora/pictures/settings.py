"""The flags of the dataset: where the pictures are, their captions, sizes and augmentation. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import at_least, between, flag, from_up_to
from ..errors import InputError
from .buckets import Buckets, make_buckets, square


LAYOUTS = ("metadata", "caption_files", "kohya", "trigger_class", "instance")
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact")


@dataclass(frozen=True)
class DataSettings:
    """Where the pictures are and how their rows are read."""

    title: ClassVar = "dataset"
    # fmt: off
    dataset_name: str | None = flag(None, "hub id of a dataset, or a local folder that holds one", may_change=True)
    dataset_config_name: str | None = flag(None, "which configuration of the hub dataset, where it has several", may_change=True)
    train_data_dir: tuple[str, ...] | None = flag(None, "folder, .zip or .tar of pictures with captions, or several of them; metadata/README.md shows every layout", nargs="+", metavar="FOLDER", may_change=True)
    dataset_layout: str | None = flag(None, "how captions lie in --train_data_dir; recognised when not given", choices=LAYOUTS, may_change=True)
    image_column: str | None = flag(None, "column with the pictures; found by itself when not given", may_change=True)
    caption_column: str | None = flag(None, "column with the captions, text or lists of text; found by itself when not given", may_change=True)
    concept_column: str | None = flag(None, "column with the concept of each picture, for --balance; the folder's name when not given", may_change=True)
    mask_column: str | None = flag(None, "column with masks: what is white in a mask counts in the loss; name.mask.png beside a picture needs no flag", may_change=True)
    max_train_samples: int | None = flag(None, "train on so many of the pictures, a choice that never changes; on all when not given", at_least(1), may_change=True)
    balance: str | None = flag(None, "concept: draw each class folder equally often, by repeating the smaller ones", choices=["concept"])
    skip_bad_images: bool = flag(False, "leave out pictures that can't be read and rows without a picture or caption, instead of stopping", may_change=True)
    dry_run: bool = flag(False, "look at the dataset, say what it holds and what is wrong with it, write --output_dir/dataset.json, and stop", may_change=True)
    preview_data: str | None = flag(None, "write a sheet of what the model will see: some pictures, their variations and captions", metavar="FILE", may_change=True)
    # fmt: on

    @property
    def balanced(self) -> bool:
        """Whether every concept has as many samples."""
        return self.balance == "concept"

    def check(self, settings):
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise InputError("Pass one of --dataset_name (hub id or folder) and --train_data_dir (folder).")
        if self.preview_data is not None and Path(self.preview_data).suffix.lower() not in (".png", ".jpg", ".webp"):
            raise InputError(f"--preview_data {self.preview_data}: name a .png, .jpg or .webp file.")


@dataclass(frozen=True)
class CaptionSettings:
    """What the captions are, and what is done to them."""

    title: ClassVar = "captions"
    # fmt: off
    instance_prompt: str | None = flag(None, "the caption of all pictures, where they have none", may_change=True)
    caption_template: str = flag("{trigger} {class}", "the caption of pictures in folders named [trigger]_[class]", may_change=True)
    trigger_word: str | None = flag(None, "word that is put in front of every caption that lacks it", may_change=True)
    caption_prefix: str = flag("", "text that is put in front of every caption", may_change=True)
    caption_suffix: str = flag("", "text that is put after every caption", may_change=True)
    caption_dropout: float = flag(0.0, "share of samples that are trained with an empty caption, for guidance", from_up_to(0, 1))
    shuffle_tags: bool = flag(False, "put a caption's tags (between commas) in another order each time")
    keep_tags: int = flag(0, "with --shuffle_tags: leave the first so many tags where they are", at_least(0))
    tag_variations: int = flag(8, "with --shuffle_tags: orders of each caption that are cached; without the cache they are endless", at_least(1))
    long_prompts: bool = flag(False, "read captions of more than 77 tokens whole, in chunks; infer.py then does it too, and A1111 always")
    # fmt: on

    def check(self, settings):
        try:
            caption = self.caption_template.format_map({"trigger": "a", "class": "b"})
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise InputError(
                f"--caption_template {self.caption_template!r}: it may hold {{trigger}} and {{class}}, and no other braces."
            ) from error
        for name, text in {"caption_template": caption, "instance_prompt": self.instance_prompt}.items():
            if text is not None and not text.strip():
                raise InputError(f"--{name} is empty: write what the pictures show.")


@dataclass(frozen=True)
class ClassPictureSettings:
    """Pictures that keep the class as the base model draws it (prior preservation)."""

    title: ClassVar = "class pictures"
    # fmt: off
    class_data_dir: str | None = flag(None, "pictures of the class in general, trained beside yours so that it isn't forgotten (DreamBooth's prior preservation)", metavar="FOLDER", may_change=True)
    class_prompt: str | None = flag(None, "the caption of the pictures in --class_data_dir, where they have none", may_change=True)
    prior_loss_weight: float = flag(1.0, "how much each picture of --class_data_dir counts in the loss, where one of yours counts 1", at_least(0, float))
    # fmt: on

    def check(self, settings):
        if self.class_data_dir is None and self.class_prompt is not None:
            raise InputError("--class_prompt is the caption of --class_data_dir's pictures: add it.")
        if self.class_prompt is not None and not self.class_prompt.strip():
            raise InputError("--class_prompt is empty: write what the pictures show.")


@dataclass(frozen=True)
class SizeSettings:
    """Which sizes pictures are trained at."""

    title: ClassVar = "sizes"
    # fmt: off
    resolution: int | None = flag(None, "side in pixels of the square that pictures are resized and cropped to; what the base model is made for when not given (512 for Stable Diffusion 1, 768 or 512 for 2, 1024 for XL)", at_least(1))
    aspect_ratio_buckets: bool = flag(False, "keep the pictures' shapes: train each at the nearest of several sizes with the area of the --resolution square")
    bucket_min_size: int | None = flag(None, "smallest side of a bucket in pixels; half of --resolution when not given", at_least(1))
    bucket_max_size: int | None = flag(None, "largest side of a bucket in pixels; twice --resolution when not given", at_least(1))
    bucket_step: int | None = flag(None, "sides of buckets are multiples of so many pixels; 64 when not given, and less for small resolutions", at_least(1))
    bucket_no_upscale: bool = flag(False, "with --aspect_ratio_buckets: train small pictures at their own size")
    image_interpolation_mode: str = flag("lanczos", "how pictures are resized", choices=INTERPOLATIONS)
    # fmt: on

    def side(self, base: Any) -> int:
        """The side of the square in pixels; `base` is the `BaseModel`."""
        return base.resolution if self.resolution is None else self.resolution

    def buckets(self, base: Any) -> Buckets:
        """Raises `InputError` where no sizes can be made of the limits, or none that the base model takes."""
        resolution = self.side(base)
        if not self.aspect_ratio_buckets:
            return square(resolution)
        return make_buckets(
            resolution, base.image_factor, smallest=self.bucket_min_size, largest=self.bucket_max_size,
            step=self.bucket_step, no_upscale=self.bucket_no_upscale,
        )  # fmt: skip

    def check(self, settings):
        for name in ("bucket_min_size", "bucket_max_size", "bucket_step", "bucket_no_upscale"):
            if getattr(self, name) not in (None, False) and not self.aspect_ratio_buckets:
                raise InputError(f"--{name} says how buckets are: add --aspect_ratio_buckets.")


@dataclass(frozen=True)
class AugmentationSettings:
    """What is random about a picture."""

    title: ClassVar = "augmentation"
    # fmt: off
    center_crop: bool = flag(False, "crop the middle of each picture; otherwise the place is random")
    random_flip: bool = flag(False, "mirror half of the pictures")
    random_rotation: float = flag(0.0, "turn pictures by up to so many degrees; less of them is shown, and corners stay filled", between(0, 180))
    random_crop_scale: float = flag(1.0, "crop pictures down to this share of their sides, such as 0.8; 1: show all that fits", between(0.1, 1))
    random_brightness: float = flag(0.0, "change the brightness by up to this share, such as 0.1", between(0, 1))
    random_contrast: float = flag(0.0, "change the contrast by up to this share, such as 0.1", between(0, 1))
    random_saturation: float = flag(0.0, "change the saturation by up to this share, such as 0.1", between(0, 1))
    random_hue: float = flag(0.0, "shift the hue by up to this share of the colour circle, such as 0.02", between(0, 0.5))
    # fmt: on

    def variations(self) -> int | None:
        """How many variations hold all there is; None where they are endless."""
        plain = AugmentationSettings(center_crop=True, random_flip=self.random_flip)
        if self != plain:
            return None
        return 2 if self.random_flip else 1
