"""The flags of the dataset: pictures, captions, sizes and augmentation. Imports nothing heavy."""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..command_line import OneOrSeveral, at_least, between, count, filled_text, flag, from_up_to, user_path
from ..config_file import Conflict, Remark
from ..errors import InputError
from .buckets import Resolutions, make_buckets, square


LAYOUTS = ("metadata", "caption_files", "kohya", "trigger_class", "instance")
PASS_ONE = "Pass one of --dataset_name (hub id or folder) and --train_data_dir (folder)."
# Larger numbers are mistakes, which would take all memory before anything is reported.
MOST_SIDE = 16384  # pixels
MOST_TAG_VARIATIONS = 1000
MOST_CLASS_IMAGES = 100_000
MOST_STEPS = 998  # of the sampler DPM++ 2M, which draws the class pictures of most base models
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact")


@dataclass(frozen=True)
class DataSettings:
    """The dataset and how its rows are read."""

    title: ClassVar = "dataset"
    conflicts: ClassVar = (
        # The columns in the file are those of the dataset in the file.
        *(
            Conflict("train_data_dir", name, clash=lambda flags: flags["dataset_name"] is not None, one_way=True)
            for name in ("dataset_config_name", "image_column", "caption_column", "concept_column", "mask_column")
        ),
        Conflict("dataset_name", "train_data_dir", PASS_ONE),
    )
    # fmt: off
    dataset_name: str | None = flag(None, "dataset to train on: hub id, or local folder with a dataset", user_path, may_change=True)
    dataset_config_name: str | None = flag(None, "configuration of the hub dataset, if it has several", filled_text, may_change=True)
    train_data_dir: tuple[str, ...] | None = flag(None, "one or several folders, .zip or .tar files of pictures with captions; metadata/README.md shows every layout", user_path, nargs="+", metavar="FOLDER", may_change=True)
    dataset_layout: str | None = flag(None, "how captions are stored in --train_data_dir (default: recognised by the files)", choices=LAYOUTS, may_change=True)
    image_column: str | None = flag(None, "column with the pictures (default: found by type and name)", filled_text, may_change=True)
    caption_column: str | None = flag(None, "column with the captions, as text or lists of text (default: found by type and name)", filled_text, may_change=True)
    concept_column: str | None = flag(None, "column with the concept of each picture, for --balance (default: the name of the folder)", filled_text, may_change=True)
    mask_column: str | None = flag(None, "column with masks: only white areas of a mask count in the loss; masks named name.mask.png or name-masklabel.png beside the pictures need no flag", filled_text, may_change=True)
    alpha_mask: bool = flag(False, "only opaque areas of a picture count in the loss; pictures without transparency count everywhere, and a mask is multiplied with the transparency of its picture")
    max_train_samples: int | None = flag(None, "maximum number of pictures to train on; the selection does not depend on the seed (default: all pictures)", count(1), may_change=True)
    balance: str | None = flag(None, "concept: use every concept (class folder) equally often per epoch, by repeating pictures of smaller concepts", choices=["concept"])
    skip_bad_images: bool = flag(False, "leave out pictures that can't be read and rows without a picture or caption, instead of stopping with an error", may_change=True)
    dry_run: bool = flag(False, "check the dataset, print a report, write dataset.html, where captions can be edited, and dataset.json to --output_dir, and exit without training", may_change=True)
    preview_data: str | None = flag(None, "write a contact sheet of what the model will see: some pictures with their variations and captions", user_path, metavar="FILE", may_change=True)
    # fmt: on

    @property
    def balanced(self) -> bool:
        """Whether every concept has equally many samples per epoch."""
        return self.balance == "concept"

    def check(self, settings):
        if self.dataset_name is None and self.train_data_dir is None:
            raise InputError(PASS_ONE)
        if self.preview_data is not None and Path(self.preview_data).suffix.lower() not in (".png", ".jpg", ".webp"):
            raise InputError(f"--preview_data {self.preview_data}: name a .png, .jpg or .webp file.")


@dataclass(frozen=True)
class CaptionSettings:
    """The captions and how they are edited."""

    title: ClassVar = "captions"
    remarks: ClassVar = tuple(
        Remark(
            name, "has no effect without --shuffle_tags or --caption_tag_dropout",
            lambda flags: not flags["shuffle_tags"] and not flags["caption_tag_dropout"],
        )
        for name in ("keep_tags", "tag_variations")
    )  # fmt: skip
    # fmt: off
    instance_prompt: str | None = flag(None, "caption for all pictures that have none", may_change=True)
    caption_template: str = flag("{trigger} {class}", "caption for pictures in folders named [trigger]_[class]", may_change=True)
    trigger_word: str | None = flag(None, "word to add in front of every caption that does not contain it", filled_text, may_change=True)
    caption_prefix: str = flag("", "text to add in front of every caption", may_change=True)
    caption_suffix: str = flag("", "text to append to every caption", may_change=True)
    caption_dropout: float = flag(0.0, "proportion of samples that are trained with an empty caption, for classifier-free guidance", from_up_to(0, 1))
    shuffle_tags: bool = flag(False, "shuffle the comma-separated tags of captions")
    caption_tag_dropout: float = flag(0.0, "probability with which each comma-separated tag of a caption is left out", from_up_to(0, 1))
    keep_tags: int = flag(0, "with --shuffle_tags and --caption_tag_dropout: number of tags at the beginning that always stay in their place", count(0))
    tag_variations: int = flag(8, "with --shuffle_tags and --caption_tag_dropout: number of cached variations per caption; without the cache, every sample is varied anew", between(1, MOST_TAG_VARIATIONS, int))
    long_prompts: bool = flag(False, "encode captions of more than 77 tokens completely, in chunks, instead of truncating them; infer.py then does so too, and A1111 always does")
    # fmt: on

    @property
    def varies_tags(self) -> bool:
        return self.shuffle_tags or self.caption_tag_dropout > 0

    def check(self, settings):
        try:
            parts = list(string.Formatter().parse(self.caption_template))
        except ValueError:  # a brace without its partner
            parts = [("{", None, None, None)]
        for literal, name, form, conversion in parts:
            if {"{", "}"} & {*literal} or name not in (None, "trigger", "class") or form or conversion:
                raise InputError(
                    f"--caption_template {self.caption_template!r}: it may contain {{trigger}} and {{class}}, but no other braces."
                )
        caption = self.caption_template.format_map({"trigger": "a", "class": "b"})
        for name, text in {"caption_template": caption, "instance_prompt": self.instance_prompt}.items():
            if text is not None and not text.strip():
                raise InputError(f"--{name} is empty: write what the pictures show.")


@dataclass(frozen=True)
class ClassPictureSettings:
    """Class pictures, which preserve how the base model draws the class (prior preservation)."""

    title: ClassVar = "class pictures"
    remarks: ClassVar = (
        Remark(
            "prior_loss_weight",
            "has no effect without --class_data_dir or --num_class_images",
            lambda flags: flags["class_data_dir"] is None and not flags["num_class_images"],
        ),
        *(
            Remark(name, "has no effect without --num_class_images", lambda flags: not flags["num_class_images"])
            for name in ("class_inference_steps", "class_guidance_scale", "sample_batch_size")
        ),
    )
    # fmt: off
    class_data_dir: str | None = flag(None, "pictures of the class in general, which are trained along with yours so that the model does not forget the class (prior preservation of DreamBooth)", user_path, metavar="FOLDER", may_change=True)
    num_class_images: int = flag(0, "number of class pictures; those that --class_data_dir lacks are drawn once by the base model and kept in --latent_cache_dir", between(0, MOST_CLASS_IMAGES, int), may_change=True)
    class_prompt: str | None = flag(None, "prompt and caption of the pictures that are drawn for --num_class_images (default: the captions of your pictures without the concept, see --concept_phrases), and caption for the pictures in --class_data_dir that have none", may_change=True)
    class_inference_steps: int = flag(30, "number of denoising steps for the class pictures that are drawn", between(1, MOST_STEPS, int), may_change=True)
    class_guidance_scale: float = flag(7.5, "classifier-free guidance scale for the class pictures that are drawn; higher values follow the prompt more closely", at_least(0), may_change=True)
    sample_batch_size: int = flag(4, "number of class pictures that are drawn at once", between(1, 1024, int), may_change=True)
    prior_loss_weight: float = flag(1.0, "weight of the class pictures in the loss; your pictures have weight 1", at_least(0))
    # fmt: on

    @property
    def from_captions(self) -> bool:
        """Whether class pictures are drawn from the captions without the concept."""
        return self.num_class_images > 0 and self.class_prompt is None

    def check(self, settings):
        if self.class_data_dir is None and not self.num_class_images and self.class_prompt is not None:
            raise InputError(
                "--class_prompt describes class pictures: add --num_class_images, such as 100, or --class_data_dir."
            )
        if self.class_prompt is not None and not self.class_prompt.strip():
            raise InputError("--class_prompt is empty: write what the pictures show.")


@dataclass(frozen=True)
class SizeSettings:
    """The sizes that pictures are trained at."""

    title: ClassVar = "sizes"
    conflicts: ClassVar = tuple(
        Conflict(
            "aspect_ratio_buckets", name, f"--{name} is an option of buckets: add --aspect_ratio_buckets.",
            lambda flags, name=name: flags[name] and not flags["aspect_ratio_buckets"], one_way=True,
        )
        for name in ("bucket_min_size", "bucket_max_size", "bucket_step", "bucket_no_upscale")
    )  # fmt: skip
    # fmt: off
    resolution: int | tuple[int, ...] | None = flag(None, "side in pixels of the square that pictures are resized and cropped to; with several values, each picture is trained once per epoch at each of them that it is large enough for, and at the smallest if it is too small for all (default: the native resolution of the base model: 512 for Stable Diffusion 1, 768 or 512 for 2, 1024 for XL)", between(1, MOST_SIDE, int), nargs="+", action=OneOrSeveral)
    aspect_ratio_buckets: bool = flag(False, "keep aspect ratios: train each picture at the nearest of several sizes with the area of the --resolution square")
    bucket_min_size: int | None = flag(None, "smallest side of a bucket in pixels (default: half of --resolution)", between(1, MOST_SIDE, int))
    bucket_max_size: int | None = flag(None, "largest side of a bucket in pixels (default: twice --resolution)", between(1, MOST_SIDE, int))
    bucket_step: int | None = flag(None, "the sides of buckets are multiples of this number of pixels (default: 64, and less for small resolutions)", between(1, MOST_SIDE, int))
    bucket_no_upscale: bool = flag(False, "with --aspect_ratio_buckets: train small pictures at their own size instead of enlarging them")
    image_interpolation_mode: str = flag("lanczos", "interpolation method for resizing pictures", choices=INTERPOLATIONS)
    # fmt: on

    def sides(self, base: Any) -> tuple[int, ...]:
        """Returns the sides of the squares in pixels, the smallest first; `base` is a `BaseModel`."""
        given = base.resolution if self.resolution is None else self.resolution
        return (given,) if isinstance(given, int) else given

    def side(self, base: Any) -> int:
        """Returns the side of the largest square in pixels, at which sample pictures and class pictures are drawn."""
        return self.sides(base)[-1]

    def resolutions(self, base: Any) -> Resolutions:
        """Returns the buckets of each resolution.

        Raises `InputError` if the limits allow no size, none that the base model accepts, or equal ones of two resolutions.
        """
        sides = self.sides(base)
        if not self.aspect_ratio_buckets:
            return Resolutions(tuple(map(square, sides)))
        resolutions = Resolutions(
            tuple(
                make_buckets(
                    side, base.image_factor, smallest=self.bucket_min_size, largest=self.bucket_max_size,
                    step=self.bucket_step, no_upscale=self.bucket_no_upscale,
                )
                for side in sides
            )
        )  # fmt: skip
        resolutions.check_distinct()
        return resolutions


@dataclass(frozen=True)
class AugmentationSettings:
    """Random augmentation of pictures."""

    title: ClassVar = "augmentation"
    # fmt: off
    center_crop: bool = flag(False, "crop the center of each picture instead of a random position")
    random_flip: bool = flag(False, "flip pictures horizontally with probability 0.5")
    random_rotation: float = flag(0.0, "rotate pictures by up to this many degrees; the crop becomes smaller, so that its corners stay filled", between(0, 180))
    random_crop_scale: float = flag(1.0, "crop pictures to a random part of their sides, at least this much, such as 0.8; 1: the largest crop that fits", between(0.1, 1))
    random_brightness: float = flag(0.0, "change the brightness by up to this factor, such as 0.1", between(0, 1))
    random_contrast: float = flag(0.0, "change the contrast by up to this factor, such as 0.1", between(0, 1))
    random_saturation: float = flag(0.0, "change the saturation by up to this factor, such as 0.1", between(0, 1))
    random_hue: float = flag(0.0, "shift the hue by up to this part of the colour circle, such as 0.02", between(0, 0.5))
    # fmt: on

    def variations(self) -> int | None:
        """Returns the number of different variations of a picture, or None if it is unlimited."""
        plain = AugmentationSettings(center_crop=True, random_flip=self.random_flip)
        if self != plain:
            return None
        return 2 if self.random_flip else 1
