"""An archive is unpacked once; an invalid archive is refused and leaves no files behind."""

import gzip
import io
import tarfile
import warnings
import zipfile

import pytest
from conftest import read_records, refusal_of
from PIL import Image

from text_to_image_lora.errors import InputError
from text_to_image_lora.pictures import archives
from text_to_image_lora.pictures.archives import unpack


def picture(shade):
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 0, 90)).save(file, "PNG")
    return file.getvalue()


GOOD = {f"{i}.png": picture(i) for i in range(4)} | {f"{i}.txt": f"cat {i}".encode() for i in range(4)}
CAPTIONS = [[f"cat {i}"] for i in range(4)]


def pack(archive, members):
    """Writes an archive with these members ({name: bytes}); its name determines the format."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(name, data)
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as file:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return archive


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "archives"


@pytest.fixture
def refusal(tmp_path, folder):
    """Returns the error message of an archive, and checks that no other files remain."""

    def refusal(archive):
        folder.mkdir(exist_ok=True)
        before = sorted(tmp_path.rglob("*"))
        message = refusal_of(unpack, archive, folder)
        assert sorted(tmp_path.rglob("*")) == before
        assert message.startswith(f"{archive}: ")
        return message

    return refusal


def test_an_archive_is_unpacked_once(tmp_path, folder):
    archive = pack(tmp_path / "set.zip", GOOD)
    first = unpack(archive, folder)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == GOOD
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert unpack(archive, folder) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("harm", ["a file", "all files", "half a file", "the list"])
def test_an_unpacked_archive_that_is_damaged_is_unpacked_again(tmp_path, folder, harm):
    """Programs that clean up caches delete files that were not used for a while."""
    archive = pack(tmp_path / "set.zip", GOOD)
    first = unpack(archive, folder)
    files = sorted(first.iterdir())
    if harm == "half a file":
        files[0].write_bytes(files[0].read_bytes()[:20])
    elif harm == "the list":
        (first.parent / archives.CONTENTS).unlink()
    else:
        for path in files[: 1 if harm == "a file" else None]:
            path.unlink()
    assert unpack(archive, folder) == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == GOOD


@pytest.mark.parametrize(
    ("ending", "names"),
    [(".zip", ["a.png", "a.png"]), (".tar", ["./a.png", "a.png"]), (".zip", ["x\\a.png", "x/a.png"])],
)
def test_two_members_of_one_name(tmp_path, refusal, ending, names):
    """The last one would replace the others in silence."""
    path = tmp_path / f"set{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as pack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `zipfile` about the double name
            for shade, name in enumerate(names):
                pack.writestr(name, picture(shade))
    else:
        with tarfile.open(path, "w") as pack:
            for shade, name in enumerate(names):
                member, data = tarfile.TarInfo(name), picture(shade)
                member.size = len(data)
                pack.addfile(member, io.BytesIO(data))
    assert "two of its members are named" in refusal(path)


def test_a_renamed_archive(tmp_path, folder):
    """The name can contain the number of repeats, so equal bytes under another name are unpacked again."""
    archive = pack(tmp_path / "set.zip", GOOD)
    first = read_records(archive, archive_dir=folder)
    again = read_records(archive.rename(tmp_path / "10_other.zip"), archive_dir=folder)
    assert again["captions"][:] == first["captions"][:] == CAPTIONS
    assert first["num_repeats"][:] == [1] * 4
    assert again["num_repeats"][:] == [10] * 4


@pytest.mark.parametrize(
    "name", ["../evil.txt", "../../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:\\evil.txt"]
)
def test_an_archive_cannot_write_elsewhere(tmp_path, refusal, name):
    assert "would leave the folder" in refusal(pack(tmp_path / "a.zip", GOOD | {name: b"evil"}))


def test_a_bad_archive_is_refused_where_bad_rows_are_left_out_too(tmp_path, folder):
    archive = pack(tmp_path / "a.zip", GOOD | {"../evil.png": b"evil"})
    with pytest.raises(InputError, match="would leave the folder"):
        read_records(archive, archive_dir=folder, leave_out=print)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_tar_with_links(tmp_path, refusal, ending, kind):
    with tarfile.open(tmp_path / f"a{ending}", "w:gz" if ending == ".tar.gz" else "w") as file:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = kind, "/etc/passwd"
        file.addfile(member)
    assert "'0.png' is a link" in refusal(tmp_path / f"a{ending}")


def test_a_zip_with_links(tmp_path, refusal):
    info = zipfile.ZipInfo("0.png")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    assert "'0.png' is a link" in refusal(tmp_path / "a.zip")


class Named(zipfile.ZipInfo):
    """A member whose name is stored in an encoding, without the flag that says that it is UTF-8."""

    encoding = "utf-8"

    def _encodeFilenameFlags(self):
        return self.filename.encode(self.encoding), 0


@pytest.mark.parametrize(
    ("encoding", "names", "found"),
    [
        ("utf-8", ["10_épée", "10_桜", "10_e\u0301"], None),
        ("cp437", ["10_épée", "10_über", "10_ñ"], None),
        ("cp1252", ["10_épée"], ["10_ΘpΘe"]),
        ("shift_jis", ["10_日本"], ["10_ô·û{"]),
    ],
)
def test_names_in_a_zip_that_do_not_say_their_encoding(tmp_path, folder, said, encoding, names, found):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for i, name in enumerate(names):
            member = Named(f"{name}/0.png")
            member.encoding = encoding
            file.writestr(member, picture(i))
    first = sorted(path.name for path in unpack(tmp_path / "a.zip", folder).iterdir())
    assert first == sorted(found or names)
    notes = [line for line in said if "its names are not in UTF-8" in line]
    assert len(notes) == (encoding != "utf-8")


@pytest.mark.parametrize("names", [["café.png"], ["good.png", "10_café/a.png"], ["é/a.txt"]])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_tar_whose_names_are_not_utf_8(tmp_path, refusal, ending, names):
    mode = "w:gz" if ending == ".tar.gz" else "w"
    with tarfile.open(tmp_path / f"a{ending}", mode, encoding="latin-1", format=tarfile.GNU_FORMAT) as file:
        for name in names:
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    shown = names[-1].replace("é", "\\xe9")
    assert f"the name of its member {shown} is not UTF-8" in refusal(tmp_path / f"a{ending}")


def test_a_bomb(tmp_path, refusal):
    archive = pack(tmp_path / "a.zip", {"0.png": b"\0" * 2**27})
    assert archive.stat().st_size < 2**18
    assert "unpacks to far more than its size" in refusal(archive)


@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_an_archive_of_too_many_files(tmp_path, refusal, folder, monkeypatch, ending):
    """Empty files count too: they have no size, but each takes an entry of the file system."""
    monkeypatch.setattr(archives, "MOST_FILES", 10)
    more = [f"more{i}.txt" for i in range(3)]
    enough = pack(tmp_path / f"enough{ending}", GOOD | dict.fromkeys(more[:2], b""))
    assert len(read_records(enough, archive_dir=folder)) == 4
    for content in (b"", b"a cat"):
        archive = pack(tmp_path / f"more{ending}", GOOD | dict.fromkeys(more, content))
        assert "it has more than 10 files. Unpack it yourself" in refusal(archive)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
def test_a_broken_archive(tmp_path, refusal, ending):
    archive = pack(tmp_path / f"set{ending}", GOOD)
    data = archive.read_bytes()
    for broken in (b"", b"no archive", data[: len(data) // 2]):
        archive.write_bytes(broken)
        assert "can't be unpacked" in refusal(archive)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_tar_that_is_cut_off_between_two_members(tmp_path, refusal, ending):
    """Also within a header, or with a broken header; `tarfile` by itself stops there without an error."""
    whole = pack(tmp_path / "set.tar", GOOD).read_bytes()
    for broken in (whole[:2048], whole[:2100], whole[:2048] + b"x" * 512 + whole[2560:]):
        (tmp_path / f"a{ending}").write_bytes(gzip.compress(broken) if ending == ".tar.gz" else broken)
        assert "can't be unpacked (it is cut off)" in refusal(tmp_path / f"a{ending}")


def test_a_folder_with_an_archive_in_it(tmp_path, folder):
    pack(tmp_path / "pictures.zip", GOOD)
    with pytest.raises(InputError, match=r"Pass the archive: .*pictures\.zip"):
        read_records(tmp_path, archive_dir=folder)
    assert (tmp_path / "pictures.zip").exists()


def header_of(kind, size):
    """A header of a .tar that says that a name, or other text that is read into memory, has this size."""
    member = tarfile.TarInfo("header")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


HEADERS = [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE]


@pytest.mark.parametrize("kind", HEADERS)
def test_a_name_in_a_tar_that_takes_all_memory(tmp_path, refusal, kind):
    """The header alone is refused: the text behind it is not read."""
    (tmp_path / "a.tar").write_bytes(header_of(kind, 6 * 2**30) + bytes(1024))
    assert "a name in it has 6,442,450,944 bytes, more than the limit of 65,536" in refusal(tmp_path / "a.tar")
    with pytest.raises(InputError, match="a name in it has"):
        archives.check_tar(tmp_path / "a.tar")


def test_a_tar_with_holes(tmp_path, refusal):
    (tmp_path / "a.tar").write_bytes(header_of(tarfile.GNUTYPE_SPARSE, 0) + bytes(1024))
    assert "its members have holes" in refusal(tmp_path / "a.tar")


def test_folders_in_a_tar_are_counted(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(archives, "MOST_FILES", 3)
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for i in range(4):
            member = tarfile.TarInfo(f"{i}")
            member.type = tarfile.DIRTYPE
            file.addfile(member)
    assert "it has more than 3 files" in refusal(tmp_path / "a.tar")
