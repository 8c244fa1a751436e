"""Class pictures that the base model draws for --num_class_images.

They are drawn once, before training, and kept in the cache: the name of their folder is a hash of everything that they
depend on. Picture i has the seed i and the prompt i modulo the number of prompts, and is drawn in a batch with fixed
neighbours. It therefore does not depend on how many pictures are drawn, by how many processes, and whether an earlier run was
killed while it drew them. Does not import torch before something is drawn.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..drawing.as_trained import AsTrained
from ..drawing.draw import batches_of, draw_batch, warn_of_cut_prompts
from ..drawing.find import Base
from ..drawing.pipeline import Job, open_studio
from ..drawing.png import describe, encode_png, source_of
from ..drawing.rows import Drawing
from ..drawing.settings import FromPictures, Machine, Model
from ..errors import InputError, TrainingError, is_out_of_memory
from ..files import counted, written_whole
from ..models.weights_files import files_identity, quick_hash
from ..pictures.layouts import make_row
from ..pictures.records import record_features
from . import interruption


logger = logging.getLogger(__name__)
VERSION = 1  # increase the number if pictures are drawn differently
CONCEPT = "class pictures"
WHERE = "while it drew class pictures; those that are drawn are kept"


class ClassImages(NamedTuple):
    """The class pictures that the base model draws for a run."""

    folder: Path
    count: int
    prompts: tuple[str, ...]
    job: Job  # what they are drawn with
    like: Drawing  # what the drawings have in common
    batch_size: int
    base_identity: str  # of `files_identity`, in the name of the folder

    def drawing(self, i: int) -> Drawing:
        """Returns what picture i shows, and how it is drawn."""
        return self.like._replace(stem=f"{i:05d}", prompt=self.prompts[i % len(self.prompts)], seed=i)

    def path(self, i: int) -> Path:
        return self.folder / f"{self.drawing(i).stem}.png"

    def missing(self) -> list[int]:
        """Returns the numbers of the pictures that are not in the cache, or are damaged there."""
        if self.folder.exists():
            os.listdir(self.folder)  # makes files of other machines visible on NFS
        size = (self.like.width, self.like.height)
        return [i for i in range(self.count) if not _is_whole(self.path(i), size)]

    def recipe(self, i: int) -> str:
        """Returns a hash of how picture i is drawn, without the base model, and what only changes the rounding."""
        drawing = self.drawing(i)
        return _hash([VERSION, drawing.prompt, drawing.seed, *_settings_of(drawing)])[:32]

    def fact(self, i: int) -> Any:
        """Returns the `Picture` that stands for picture i in a dry run, before it is drawn."""
        from ..pictures.examine import Picture

        return Picture(self.recipe(i), self.like.width or 0, self.like.height or 0, int(self.recipe(i), 16))

    def make_records(self) -> Any:
        """Makes the records of the pictures, see `pictures.records`; the files need not be there yet."""
        import datasets

        rows = [
            make_row(self.path(i), [self.drawing(i).prompt], CONCEPT, 1, str(self.path(i))) for i in range(self.count)
        ]
        rows = [row | {"recipe": self.recipe(i)} for i, row in enumerate(rows)]
        return datasets.Dataset.from_list(rows, features=record_features())

    def describe(self, num_missing: int) -> str:
        """Describes the pictures in one line."""
        what = f"class pictures: {self.count} of the base model, from {counted(len(self.prompts), 'prompt')}, in {self.folder}"
        if not num_missing:
            return f"{what}; all of them are in the cache already"
        return (
            f"{what}; {self.count - num_missing} are in the cache already, and {num_missing} are drawn before training"
        )

    def write_captions(self) -> None:
        """Writes the prompts of all pictures in the folder as its metadata.jsonl, so that it can be trained on elsewhere."""
        pictures = sorted(path for path in self.folder.glob("*.png") if path.stem.isdecimal())
        rows = [{"file_name": path.name, "text": self.drawing(int(path.stem)).prompt} for path in pictures]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file = self.folder / "metadata.jsonl"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.unlink(missing_ok=True)
            with written_whole(file, shared=True) as temporary:
                temporary.write_text(text, encoding="utf-8")


def drawn_folders(pictures: Any) -> list[str]:
    """Returns the folders of the class pictures in a `PictureSet` that the base model has drawn."""
    drawn = [i for i, recipe in enumerate(pictures.records["recipe"][:]) if recipe]
    return sorted({str(Path(image["path"]).parent) for image in pictures.records.select(drawn)["image"][:]})


def _hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _settings_of(drawing):
    return [drawing.num_inference_steps, drawing.guidance_scale, drawing.clip_skip, drawing.width, drawing.height]


def _is_whole(path, size):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
            return image.size == size
    except (OSError, SyntaxError):  # Pillow raises the latter for a broken part of a PNG
        return False


def plan(settings: Any, base: Any, prompts: Sequence[str], count: int) -> ClassImages:
    """Plans `count` class pictures, drawn from `prompts` as the run's sample pictures of the base model are.

    Raises `InputError` if they can't be drawn. The device and the size of a batch only change the rounding, so that they are
    not part of the folder's name.
    """
    given, timesteps = settings.base, settings.timesteps
    own, vae, side = settings.class_pictures, given.pretrained_vae_model_name_or_path, settings.sizes.side(base)
    if vae is None and not base.has_vae:
        raise InputError(f"{base.source}: it contains no VAE. Pass one with --pretrained_vae_model_name_or_path.")
    trained = AsTrained(
        timesteps.prediction_type, timesteps.rescale_betas_zero_snr, settings.captions.long_prompts or None, None,
        given.clip_skip or None, vae,
    )  # fmt: skip
    like = Drawing(
        num_inference_steps=own.class_inference_steps, guidance_scale=own.class_guidance_scale,
        clip_skip=given.clip_skip or 0, height=side, width=side,
    )  # fmt: skip
    vae_files = sorted(path for path in [Path(vae), *Path(vae).glob("*")] if path.is_file()) if vae else []
    vae_identity = [(path.name, quick_hash(path)) for path in vae_files] or vae
    base_identity = files_identity(base)
    models = [base_identity, vae_identity, settings.speed.precision]
    how = [trained.prediction_type, trained.zero_snr, trained.long_prompts, *_settings_of(like)]
    name = _hash([VERSION, models, how, list(prompts)])
    folder = settings.cache.folder / "class_pictures" / name[:40]
    job = Job(Base(base), (), trained)
    return ClassImages(folder, count, tuple(prompts), job, like, own.sample_batch_size, base_identity)


def draw_missing(settings: Any, found: Any, accelerator: Any) -> None:
    """Draws the class pictures of the `Inputs` that are not in the cache; the processes share the work."""
    from ..pictures.examine import usable_pictures
    from . import freed_memory
    from .processes import broadcast_from_main

    images = found.class_images
    if images is None:
        return
    missing = broadcast_from_main(images.missing, accelerator)
    logger.info(images.describe(len(missing)))
    if missing:
        if not settings.data.skip_bad_images:  # a bad picture is reported before a model is loaded
            own = found.records.select(range(len(found.records) - images.count))
            usable_pictures(
                own, settings.cache.folder, skip_bad_images=False, accelerator=accelerator,
                alpha_mask=settings.data.alpha_mask,
            )  # fmt: skip
        interruption.defer_requests()
        rank, world_size = accelerator.process_index, accelerator.num_processes
        blocks = sorted({i // images.batch_size for i in missing})
        _draw_blocks(images, blocks[rank::world_size], accelerator)
        interruption.stop_together(WHERE)
        # Machines that share no disk also draw the pictures of the others; otherwise nothing is missing any more.
        _draw_blocks(images, sorted({i // images.batch_size for i in images.missing()}), accelerator)
        interruption.stop_together(WHERE)
        gc.collect()  # the pipeline is in circular references
        freed_memory.release(accelerator.device)
        interruption.obey_requests(interruption.BEFORE_TRAINING)
    if accelerator.is_local_main_process:
        images.write_captions()


def _draw_blocks(images, blocks, accelerator):
    """Draws blocks of consecutive pictures, and saves those that are missing.

    A block is always drawn as a whole, because the rounding of a picture depends on the size of its batch.
    """
    if not blocks:
        return
    from tqdm.auto import tqdm

    studio, source = _open(images.job, accelerator)
    # Otherwise these pictures would be taken for those of the files that were planned with.
    if files_identity(images.job.base.model) != images.base_identity:
        raise TrainingError(
            f"{images.job.base.model.source}: the files were changed while they were loaded. Run the same command again."
        )
    work = []
    for block in blocks:
        drawings = [images.drawing(block * images.batch_size + k) for k in range(images.batch_size)]
        work += [(drawings, batch) for batch in batches_of(studio, drawings, images.batch_size)]
    warn_of_cut_prompts(studio, [drawing for drawings, _ in work for drawing in drawings])
    bar = tqdm(
        total=sum(batch.num_steps for _, batch in work), desc="drawing class pictures", unit="step",
        disable=not accelerator.is_local_main_process,
    )  # fmt: skip

    def after_step(pipe):
        bar.update()
        pipe._interrupt = interruption.stop_requested() is not None

    with bar:
        for drawings, batch in work:
            if interruption.stop_requested():
                return
            for drawn in _draw(studio, drawings, batch, after_step):
                drawing = drawings[drawn.index]
                _save(images, drawing, drawn.image, describe(drawing, drawn, source))


def _save(images, drawing, image, chunks):
    """Writes a picture, unless it is there or was only drawn to fill the last block."""
    i = drawing.seed
    if i < images.count and not _is_whole(images.path(i), image.size):
        images.path(i).unlink(missing_ok=True)
        with written_whole(images.path(i), shared=True) as temporary:
            temporary.write_bytes(encode_png(image, chunks))


def _draw(studio, drawings, batch, after_step):
    try:
        return draw_batch(studio, drawings, batch, after_step)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "--sample_batch_size 1" if len(drawings) > 1 else "--mixed_precision bf16 or a smaller --resolution"
        raise TrainingError(
            f"The memory is too small for drawing {counted(len(drawings), 'class picture')} at once. Pass {remedy}; the pictures "
            "that are drawn are kept."
        ) from error


def _open(job, accelerator):
    """Returns the `Studio` of the base model, and the `Source` that each file records."""
    import diffusers
    import transformers

    from ..models.modules import dtype_of
    from ..models.samplers import make_noise_scheduler

    device, dtype = accelerator.device, dtype_of(accelerator.mixed_precision)
    libraries = [module.utils.logging for module in (diffusers, transformers)]
    levels = [library.get_verbosity() for library in libraries]
    studio = open_studio(job, Machine(), str(device), dtype)
    for library, level in zip(libraries, levels, strict=True):
        library.set_verbosity(level)
    base, trained = job.base.model, job.as_trained
    scheduler_config = studio.scheduler_config | base.scheduler_changes
    config = make_noise_scheduler(
        scheduler_config, prediction_type=trained.prediction_type, rescale_betas_zero_snr=bool(trained.zero_snr)
    ).config
    trained = trained._replace(prediction_type=config.prediction_type, zero_snr=bool(config.rescale_betas_zero_snr))
    model = Model(base.source, base.single_file_config, base.revision, base.variant)
    source = source_of(model, FromPictures(), vae=trained.vae, dtype=dtype, device=str(device), compiled=False)
    return studio._replace(as_trained=trained, scheduler_config=scheduler_config), source
