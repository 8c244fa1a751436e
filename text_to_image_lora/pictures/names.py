"""What the names of files and folders say: pictures, their masks and caption files, and what is passed over."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..files import counted, has_utf8_name, printable
from .archives import ARCHIVE_ENDINGS, OTHER_ARCHIVE_ENDINGS
from .formats import PLUGINS, is_readable, missing_plugin
from .inside import check_file, is_inside


METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")
CAPTION_ENDINGS = (".txt", ".caption")
MASK_ENDINGS = (".mask.png", "-masklabel.png")  # the second is OneTrainer's
CONDITION_ENDING = "-condlabel.png"  # OneTrainer's conditioning pictures
# Thumbnails, deleted files and snapshots of NAS systems and Windows; file managers hide these folders.
IGNORED_FOLDERS = {
    "@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "system volume information", "#snapshot", "@tmp",
    "@recently-snapshot", "lost+found", "lost.dir", "thumbs",
}  # fmt: skip
RUN_FILE = "run.yaml"  # in the output folder of a training run, whose sample pictures are not to be trained on
# Not named among the files that are passed over, even if a caption file of the same name lies beside them.
NO_PICTURES = {
    ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".npz", ".npy", ".safetensors", ".pt", ".md", ".html",
    ".xml", ".yaml", ".yml", ".toml", ".log", ".db", ".ini", ".py", ".sh", ".bat", ".bak", ".zip",
}  # fmt: skip
# Formats that cameras and drawing programs write, which are named even without a caption file.
OTHER_PICTURES = {
    ".psd", ".psb", ".xcf", ".kra", ".clip", ".svg", ".eps", ".ai", ".exr", ".hdr", ".ico", ".dds", ".pcx", ".raw", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".mp4", ".mov", ".webm",
}  # fmt: skip


class Listing(NamedTuple):
    """The files below a folder, and how many folders of each name were not read."""

    files: list[Path]
    ignored: Counter

    def below(self, folder: Path) -> "Listing":
        """Returns the files below a subfolder."""
        return Listing([path for path in self.files if path.is_relative_to(folder)], self.ignored)

    def without_pictures(self) -> "Listing":
        """Returns archives and ignored folders only, for folders whose pictures are named by a table."""
        endings = (*ARCHIVE_ENDINGS, *OTHER_ARCHIVE_ENDINGS)
        return Listing([path for path in self.files if path.name.lower().endswith(endings)], self.ignored)


def find_files(folder: Path, others: Iterable[Path] = ()) -> Listing:
    """Lists the files below a folder, sorted, without hidden ones, and without those that are no part of a dataset.

    Ignored are hidden files and folders, folders such as __MACOSX, `IGNORED_FOLDERS`, the output folders of training runs,
    and links to folders in `others`, which are read themselves.
    """

    def refuse(error):
        raise InputError(f"{error.filename}: it can't be read ({error.strerror}).") from error

    check_name(folder.resolve())
    found, ignored = [], Counter()
    for root, directories, names in os.walk(folder, onerror=refuse):
        if RUN_FILE in names and Path(root) != folder:
            ignored[Path(root).name] += 1
            directories[:] = []
            continue
        ignored.update(name for name in directories if name.casefold() in IGNORED_FOLDERS)
        directories[:] = sorted(
            name for name in directories if not name.startswith((".", "__")) and name.casefold() not in IGNORED_FOLDERS
        )
        for link in (Path(root) / name for name in directories if (Path(root) / name).is_symlink()):
            if not is_inside(link, others):
                raise InputError(f"{link}: it is a link to a folder. Pass that folder too: --train_data_dir A B")
        found += [Path(root) / name for name in sorted(names) if not name.startswith(".")]
    return Listing(found, ignored)


def check_name(path: Path) -> None:
    """Raises `InputError` if the name of a file or folder is not valid Unicode, so that it could not be stored."""
    if reason := reason_against(path):
        raise InputError(f"{printable(path)}: {reason}. Rename it, for example with convmv.")


def reason_against(path: Path) -> str | None:
    """Returns why the name of a file can't be used, or None."""
    return None if has_utf8_name(path) else "its name holds bytes that are not UTF-8"


def is_picture(path: Path) -> bool:
    """Whether a file is a picture that can be read, and neither a mask nor a conditioning picture."""
    return is_readable(path.suffix) and not path.name.lower().endswith((*MASK_ENDINGS, CONDITION_ENDING))


def is_mask(path: Path) -> bool:
    return path.name.lower().endswith(MASK_ENDINGS)


class CaptionFiles:
    """Finds the caption file beside a picture: its name without the ending, and .txt or .caption in any case.

    Accents may be in composed form in one name and in decomposed form (as on macOS) in the other.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = {self._key(path): path for path in files if path.suffix.lower() in CAPTION_ENDINGS}

    @staticmethod
    def _key(path):
        return unicodedata.normalize("NFC", str(path.with_suffix(""))), path.suffix.lower()

    def beside(self, picture: Path) -> Path | None:
        stem, _ = self._key(picture)
        return next((self.files[stem, ending] for ending in CAPTION_ENDINGS if (stem, ending) in self.files), None)


def has_caption_files(files: list[Path]) -> bool:
    """Whether a caption file lies beside any of the pictures."""
    captions = CaptionFiles(files)
    return any(captions.beside(path) for path in files if is_picture(path))


def mask_beside(picture: Path, homes: Iterable[Path]) -> Path | None:
    """Returns the mask beside a picture, or None; one that leads out of the folders `homes` is an `InputError`."""
    for ending in MASK_ENDINGS:
        try:
            mask = picture.with_name(picture.stem + ending)
            mask.lstat()
        except OSError:  # there is none, or the name is too long with the ending
            continue
        check_file(mask, homes)
        return mask
    return None


def other_tables(files: list[Path]) -> list[Path]:
    """Returns the files that may hold captions although they are not named as metadata files."""
    pictures = {path.with_suffix("") for path in files if is_picture(path)}
    return [
        path
        for path in files
        if path.suffix.lower() in TABLE_ENDINGS
        and path.name.lower() not in METADATA_NAMES
        and path.with_suffix("") not in pictures
    ]


def passed_over(listing: Listing) -> list[str]:
    """Describes what is not read although it may be meant to be: a line for each kind, with the remedy."""
    files, captions, lines = listing.files, CaptionFiles(listing.files), []
    pictures = {path.with_suffix("") for path in files if is_picture(path)}
    others = defaultdict(list)
    for path in files:
        ending = path.suffix.lower()
        if path.name.lower().endswith(CONDITION_ENDING):
            others[CONDITION_ENDING].append(path)
        elif is_picture(path) or is_mask(path) or ending in CAPTION_ENDINGS or path.with_suffix("") in pictures:
            continue
        elif ending in PLUGINS or ending in OTHER_PICTURES or (ending not in NO_PICTURES and captions.beside(path)):
            others[ending].append(path)
    for ending, paths in others.items():
        plugin = missing_plugin(ending)
        if ending == CONDITION_ENDING:
            remedy = "these are OneTrainer's conditioning pictures"
        elif plugin is not None:
            remedy = f"run `pip install {plugin.package}`, or save as PNG or JPEG"
        else:
            remedy = "save as PNG or JPEG" if ending else "add the ending of the format, such as .png"
        kind = f"{ending} file" if ending else "file without an ending"
        lines.append(f"{counted(len(paths), kind)} will not be read ({remedy}); the first: {printable(paths[0])}")
    archives = [path for path in files if path.name.lower().endswith(ARCHIVE_ENDINGS)]
    sealed = [path for path in files if path.name.lower().endswith(OTHER_ARCHIVE_ENDINGS)]
    sealed = sorted({*sealed} - {*archives})  # `.tar.gz` also ends with `.gz`
    if archives:
        named = " ".join(map(printable, archives[:3])) + (" ..." if len(archives) > 3 else "")
        what = "the archive" if len(archives) == 1 else "the archives"
        lines.append(f"{counted(len(archives), 'archive')} in it will not be read. Pass {what}: {named}")
    if sealed:
        lines.append(
            f"{counted(len(sealed), 'archive')} in it can't be read (unpack, or pack again as .zip); "
            f"the first: {printable(sealed[0])}"
        )
    if listing.ignored:
        named = ", ".join(f"{name} ({counted(count, 'folder')})" for name, count in sorted(listing.ignored.items()))
        lines.append(f"folders of thumbnails, deleted files or runs will not be read (rename those you mean): {named}")
    return lines
