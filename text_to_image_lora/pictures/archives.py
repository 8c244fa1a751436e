"""Unpacks .zip and .tar archives, and refuses those that write outside of their folder or unpack to far too much."""

import bz2
import gzip
import hashlib
import logging
import lzma
import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError
from ..files import has_utf8_name, printable, reason_of, written_whole


logger = logging.getLogger(__name__)
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OTHER_ARCHIVE_ENDINGS = (
    ".rar",
    ".7z",
    ".tar.zst",
    ".tar.lz",
    ".tar.lzma",
    ".cab",
    ".iso",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
)
BLOCK = 2**20
# Limits on what an archive unpacks to: pictures are compressed already, so a larger ratio means a zip bomb.
MOST_BYTES_PER_BYTE = 100
ALWAYS_ALLOWED_BYTES = 2**26
CONTENTS = ".contents"  # beside the folder of an unpacked archive
MOST_FILES = 2_000_000
COMPRESSED = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}  # by the names of the `datasets` library
MOST_NAME_BYTES = 2**16  # of a name in a .tar, or of its other headers, which are read into memory


def is_archive(path: str | Path) -> bool:
    return Path(path).name.lower().endswith(ARCHIVE_ENDINGS) and Path(path).is_file()


def unpack(archive: str | Path, folder: str | Path) -> Path:
    """Unpacks an archive into a subfolder of `folder` named by a hash of its content, unless it is there already.

    Hidden files are left out. Raises `InputError`, and leaves nothing behind, for an archive that is broken or encrypted,
    contains links or paths outside of its folder, or unpacks to more than `MOST_BYTES_PER_BYTE` times its size.
    """
    archive = Path(archive)
    digest = hashlib.sha256()
    try:
        digest.update(archive.name.encode())  # the name can be a caption, so a renamed archive is unpacked again
        with open(archive, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{archive}: it can't be read ({error.strerror}).") from error
    name = archive.name[: -len(next(e for e in ARCHIVE_ENDINGS if archive.name.lower().endswith(e)))]
    # The subfolder keeps the archive's name, because folder names can hold captions, repeats and concepts.
    target = Path(folder) / digest.hexdigest()[:32] / name
    if target.exists():
        if _is_complete(target):
            return target
        logger.info(f"{printable(archive)}: files of the unpacked archive are missing, so it is unpacked again")
        shutil.rmtree(target.parent, ignore_errors=True)
    try:
        with written_whole(target.parent, folder=True, shared=True) as temporary:
            (temporary / name).mkdir()
            _unpack_members(archive, temporary / name)
            (temporary / CONTENTS).write_text(_contents_of(temporary / name))
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"{archive}: a name in it is not UTF-8, although the archive says so. Pack it again."
        ) from error
    except Exception as error:  # each archive format has its own exceptions
        raise InputError(
            f"{archive}: it can't be unpacked ({reason_of(error)}). Pack or download it again."
        ) from error
    return target


def _contents_of(folder):
    """The number of files in an unpacked archive, and of their bytes: programs that clean up caches delete single files."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{len(sizes)} files, {sum(sizes)} bytes"


def _is_complete(folder):
    try:
        return (folder.parent / CONTENTS).read_text() == _contents_of(folder)
    except OSError:
        return False


def _unpack_members(archive, target):
    room = _room(archive, target)
    for count, (name, source) in enumerate(_members(archive), start=1):
        parts = PurePosixPath(name.replace("\\", "/")).parts
        _check_count(archive, count)
        if not parts or ".." in parts or name.startswith(("/", "\\")) or parts[0][1:2] == ":":
            raise InputError(f"{archive}: its member {name!r} would leave the folder. Pack the pictures again.")
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        if not has_utf8_name(name):
            raise InputError(
                f"{archive}: the name of its member {printable(name)} is not UTF-8. Unpack it, rename the file, and pass the folder."
            )
        if source is None:
            raise InputError(f"{archive}: its member {name!r} is a link. Pack the pictures themselves.")
        path = target.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise InputError(
                f"{archive}: two of its members are named {printable(name)}. Unpack it, rename one, and pass the folder."
            )
        with source() as member, open(path, "wb") as file:  # pyright: ignore - None is for members without data only
            while block := member.read(BLOCK):
                room -= len(block)
                _check_room(archive, room)
                file.write(block)


def _names_in_zip(archive, members):
    """Returns the names of the members of a .zip.

    A name that does not say that it is UTF-8 is UTF-8 all the same if macOS wrote it; `zipfile` reads it as code page 437,
    which is right only for some programs and languages.
    """
    names, doubtful = [member.filename for member in members], None
    for index, member in enumerate(members):
        if member.flag_bits & 0x800 or member.filename.isascii():
            continue
        try:
            names[index] = member.filename.encode("cp437").decode()
        except UnicodeError:
            doubtful = doubtful or member.filename
    if doubtful:
        logger.info(
            f"{archive}: its names are not in UTF-8, so some letters may be wrong, as in {doubtful!r}. If captions depend on "
            "the names, unpack the archive yourself, and pass the folder."
        )
    return names


class LimitedTarInfo(tarfile.TarInfo):
    """A member of a .tar; raises `InputError` for headers that `tarfile` would read without a limit."""

    def _proc_member(self, archive: Any) -> Any:  # tarfile calls it for each header
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise InputError(f"{archive.name}: its members have holes. Unpack it yourself, and pass the folder.")
        is_header = self.type in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if is_header and self.size > MOST_NAME_BYTES:
            raise InputError(
                f"{archive.name}: a name in it has {self.size:,} bytes, more than the limit of {MOST_NAME_BYTES:,}. Unpack "
                "it yourself if you trust it, and pass the folder."
            )
        return super()._proc_member(archive)  # pyright: ignore - it is not declared in the type stubs


def check_tar(archive: Path) -> None:
    """Raises `InputError` for a .tar that a library is to read, if its names or the number of its files exceed the limits."""
    with tarfile.open(archive, tarinfo=LimitedTarInfo) as pack:
        for count, _ in enumerate(pack, start=1):
            _check_count(archive, count)


def check_packed(path: Path) -> None:
    """Raises `InputError` for a file that the `datasets` library would unpack to far too much, or that can't be checked.

    The library unpacks data files according to their first bytes, whatever their names, and without limits.
    """
    from datasets.utils.extract import Extractor

    kind = Extractor.infer_extractor_format(path)
    if kind == "tar":
        check_tar(path)
    elif kind == "zip":
        with zipfile.ZipFile(path) as pack:
            members = pack.infolist()  # `zipfile` unpacks no more of a member than this says
            _check_count(path, len(members))
            _check_room(path, _room(path, path.parent) - sum(member.file_size for member in members))
    elif kind in COMPRESSED:
        room = _room(path, path.parent)
        with COMPRESSED[kind](path) as file:
            while block := file.read(BLOCK):
                room -= len(block)
                _check_room(path, room)
    elif kind is not None:
        raise InputError(f"{path}: data files in the format {kind} are not read. Unpack it, and name the file in it.")


def _room(archive, target):
    """Returns how many bytes an archive may unpack to, on the disk of an existing folder."""
    room = max(ALWAYS_ALLOWED_BYTES, MOST_BYTES_PER_BYTE * archive.stat().st_size)
    return min(room, shutil.disk_usage(target).free)


def _check_room(archive, room):
    if room < 0:
        raise InputError(
            f"{archive}: it unpacks to far more than its size, or than the disk holds. Unpack it yourself if you trust it, "
            "and pass the folder."
        )


def _check_count(archive, count):
    if count > MOST_FILES:
        raise InputError(f"{archive}: it has more than {MOST_FILES:,} files. Unpack it yourself, and pass the folder.")


def _members(archive):
    """Yields the name of each file and a function that opens it, or None instead of the function for a link."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as pack:
            members = pack.infolist()
            for name, member in zip(_names_in_zip(archive, members), members):
                is_link = member.external_attr >> 16 & 0o170000 == 0o120000
                if not member.is_dir():
                    yield name, None if is_link else lambda member=member: pack.open(member)
    else:
        with tarfile.open(archive, tarinfo=LimitedTarInfo) as pack:
            for count, member in enumerate(pack, start=1):
                _check_count(archive, count)
                if not member.isdir():
                    name = member.name.removeprefix("./")
                    yield name, (lambda member=member: pack.extractfile(member)) if member.isfile() else None
            pack.fileobj.seek(pack.offset)
            if pack.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it is cut off")  # `tarfile` treats an unreadable member as the end
