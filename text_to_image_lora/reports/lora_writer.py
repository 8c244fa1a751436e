"""The LoRA files of a run: written in each dialect that is asked for, and read back."""

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import NotANumberError
from ..models import header, kohya, lora, lora_file, receipt
from .sample_pictures import latest_images


class LoraWriter(NamedTuple):
    """Writes the LoRA of the adapted models ({component: model}) wherever it is kept: checkpoints, epochs, best, the end.

    `told` are strings of the run for the files' headers, `names` the family's `KohyaNames`. `extras` are what kohya's file
    holds too: "tags" of the `captions` and, at the end, a "thumbnail": the first of the sample pictures of `prompts`.
    """

    adapted: dict[str, Any]
    output_dir: Path
    told: dict[str, str]
    names: Any
    started_at: int  # seconds since 1970
    steps_per_epoch: int
    captions: tuple | list  # a group for each picture
    in_kohya_format: bool = False
    extras: tuple | list = ()
    prompts: tuple | list = ()

    def write(self, folder, step):
        """Writes the LoRA of a step into a folder; returns its path, kohya's or None, and in words what arrives where.

        `NotANumberError` where its weights are not numbers, `RuntimeError` where a file does not read as it was meant.
        """
        components = {name: lora.adapter_state(model) for name, model in self.adapted.items()}
        if not all(value.isfinite().all() for state, _ in components.values() for value in state.values()):
            raise NotANumberError(
                f"After step {step} the weights are not numbers any more. Lower --learning_rate; what was saved before is "
                f"in {self.output_dir}."
            )
        layers = {name: receipt.layer_shapes(model) for name, model in self.adapted.items()}
        finished, kohya_path = Path(folder) == self.output_dir, None
        kohya_name = kohya.file_name(self.output_dir, None if finished else step)
        told = self.told | header.header_for_readers(
            self.told, name=Path(kohya_name).stem, started_at=self.started_at, step=step,
            steps_per_epoch=self.steps_per_epoch, num_pictures=len(self.captions), names=self.names,
        )  # fmt: skip
        path = lora_file.save_lora(folder, components, told)
        count = receipt.check_arrival(path, components, layers)
        arrives = f"{count} of {count} modules arrive, for diffusers"
        if self.in_kohya_format:
            if "tags" in self.extras:
                captions = [caption for group in self.captions for caption in group]
                told |= {"ss_tag_frequency": header.tag_frequency(captions, Path(kohya_name).stem)}
            drawn = latest_images(self.output_dir, self.prompts) if "thumbnail" in self.extras and finished else []
            if drawn:  # none where the run was finished before a prompt was asked for
                told |= {"modelspec.thumbnail": header.thumbnail(drawn[0][1])}
            kohya_path = kohya.save_kohya(Path(folder) / kohya_name, components, told, names=self.names)
            receipt.check_arrival(kohya_path, components, layers, by_kohyas_names=True)
            arrives += f" and by kohya's names ({kohya_path})"
        return path, kohya_path, arrives
