"""Writes the LoRA files of a run in the requested formats, and verifies final files by reading them back."""

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import NotANumberError
from ..models import header, kohya, lora, lora_file, receipt
from .sample_pictures import latest_images


class LoraWriter(NamedTuple):
    """Writes the LoRA of a run into its checkpoints, epoch-*, best/ and output folder."""

    adapted: dict[str, Any]  # {component: adapted model}
    output_dir: Path
    run_header: dict[str, str]  # the run's settings, for the headers of the files
    names: Any  # the family's `KohyaNames`
    started_at: int  # seconds since 1970
    steps_per_epoch: int
    captions: tuple | list  # one group of captions for each picture
    in_kohya_format: bool = False
    extras: tuple | list = ()  # "tags" and "thumbnail", in the header of kohya's file
    prompts: tuple | list = ()  # of the sample pictures, the first of which is the thumbnail

    def write(self, folder: str | Path, step: int, *, verifies: bool = True) -> tuple[Path, Path | None, str]:
        """Writes the LoRA of a step into a folder; returns its path, kohya's path or None, and a line on what was verified.

        Files in checkpoints are not verified, as they are no results. Raises `NotANumberError` if weights are not finite, `TrainingError` if a file does not read back as it was trained.
        """
        components = {name: lora.adapter_state(model) for name, model in self.adapted.items()}
        if not all(value.isfinite().all() for state, _ in components.values() for value in state.values()):
            raise NotANumberError(
                f"The LoRA weights contain NaN or infinity after step {step}. Lower --learning_rate; everything saved before "
                f"is in {self.output_dir}."
            )
        finished, kohya_path = Path(folder) == self.output_dir, None
        kohya_name = kohya.file_name(self.output_dir, None if finished else step)
        metadata = self.run_header | header.header_for_readers(
            self.run_header, name=Path(kohya_name).stem, started_at=self.started_at, step=step,
            steps_per_epoch=self.steps_per_epoch, num_pictures=len(self.captions), names=self.names,
        )  # fmt: skip
        path = lora_file.save_lora(Path(folder) / lora_file.WEIGHTS_NAME, components, metadata)
        if self.in_kohya_format:
            if "tags" in self.extras:
                captions = [caption for group in self.captions for caption in group]
                metadata |= {"ss_tag_frequency": header.tag_frequency(captions, Path(kohya_name).stem)}
            drawn = latest_images(self.output_dir, self.prompts) if "thumbnail" in self.extras and finished else []
            if drawn:  # there are none if the prompt was added after the run had finished
                metadata |= {"modelspec.thumbnail": header.thumbnail(drawn[0][1])}
            kohya_path = kohya.save_kohya(Path(folder) / kohya_name, components, metadata, names=self.names)
        return path, kohya_path, self._verify(components, path, kohya_path) if verifies else ""

    def _verify(self, components, path, kohya_path):
        layers = {name: receipt.layer_shapes(model) for name, model in self.adapted.items()}
        count = receipt.check_lora_file(path, components, layers)
        line = f"{count} of {count} LoRA modules read back correctly from the diffusers file"
        if kohya_path is not None:
            receipt.check_lora_file(kohya_path, components, layers, by_kohyas_names=True)
            line += f" and from the kohya file ({kohya_path})"
        return line
