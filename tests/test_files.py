"""Files are written atomically, reasons fit into one line, and a path is not mistaken for a hub id."""

import os
from pathlib import Path

import pytest
from conftest import refusal_of

from text_to_image_lora import files
from text_to_image_lora.drawing.prompts import read_prompts
from text_to_image_lora.errors import InputError
from text_to_image_lora.files import expand_pattern, reason_of, remove_folder, write_whole, written_whole
from text_to_image_lora.hub import is_hub_id


def content(folder):
    """Returns {path in the folder: bytes} of all files; empty folders have the value None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def write(path, text, *, folder, shared, then=lambda: None):
    """Writes a file, or a folder with a file, and calls a function before it is put in its place."""
    with written_whole(path, folder=folder, shared=shared) as temporary:
        file = temporary / "sub" / "file.txt" if folder else temporary
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        then()


KINDS = pytest.mark.parametrize(("folder", "shared"), [(False, False), (True, False), (False, True), (True, True)])


def stop():
    raise KeyboardInterrupt


@KINDS
def test_an_exception_leaves_what_was_there(tmp_path, folder, shared):
    write(tmp_path / "there", "old", folder=folder, shared=shared)
    before = content(tmp_path)
    for name in ("there", "new"):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / name, "half", folder=folder, shared=shared, then=stop)
        assert content(tmp_path) == before


@KINDS
def test_nothing_is_there_before_it_is_whole(tmp_path, folder, shared):
    """Until then there is a hidden file or folder without an extension, which no reader mistakes for weights."""
    seen, target = [], tmp_path / "deep" / "a.safetensors"
    write(target, "new", folder=folder, shared=shared, then=lambda: seen.extend(target.parent.iterdir()))
    assert [(path.name[0], path.suffix) for path in seen] == [(".", ".tmp")]
    assert list(target.parent.iterdir()) == [target]
    assert (target / "sub" / "file.txt" if folder else target).read_text() == "new"


def test_a_file_is_replaced(tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "file", text, folder=False, shared=False)
        assert content(tmp_path) == {"file": text.encode()}


@pytest.mark.parametrize("links", [True, False], ids=["", "a file system without links"])
def test_a_shared_file_that_is_there_stays(tmp_path, monkeypatch, links):
    """Another machine may be reading the file, and every process would write equal content."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError("no links here")))
    for text in ("first", "second"):
        write(tmp_path / "file", text, folder=False, shared=True)
        assert content(tmp_path) == {"file": b"first" if links else text.encode()}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with written_whole(tmp_path / "deep" / "folder", folder=True) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / f"{name}.txt").write_text(name)
    assert content(tmp_path) == {"deep/folder/sub/second.txt": b"second"}


def test_what_a_kill_left_is_not_taken_up(tmp_path):
    """A killed process has left an incomplete folder and an old folder that it had moved aside."""
    left = [".folder.0123abcd.tmp", ".folder.0123abcd.old", ".a.png.99999999.tmp"]
    kept = [".folder.tmp", ".env", "a.0123abcd.tmp", ".folder.0123abcd.tmp.txt", ".0123abcd.tmp"]
    for name in left + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("half")
    for text in ("one", "two"):
        write(tmp_path / "folder", text, folder=True, shared=False)
    assert (tmp_path / "folder" / "sub" / "file.txt").read_text() == "two"
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["folder", *kept])


@pytest.mark.parametrize("links", [True, False], ids=["", "a file system without links"])
def test_a_new_file_replaces_nothing(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError("no links here")))
    assert files.write_new(tmp_path / "a.png", b"first")
    assert not files.write_new(tmp_path / "a.png", b"second")
    assert content(tmp_path) == {"a.png": b"first"}


@pytest.mark.parametrize("folder", [True, False])
def test_several_processes_may_write_what_is_shared(tmp_path, folder):
    """Two processes do not disturb each other; the first file in place stays."""
    path, options = tmp_path / "thing", dict(folder=folder, shared=True)
    write(path, "outer", **options, then=lambda: write(path, "inner", **options))
    assert content(tmp_path) == {"thing/sub/file.txt" if folder else "thing": b"inner"}


def test_a_shared_folder_that_cannot_be_put_in_place_is_reported(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("no room")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no room"):
        write(tmp_path / "folder", "new", folder=True, shared=True)
    assert content(tmp_path) == {}


def test_text_is_written_as_utf_8_and_bytes_as_they_are(tmp_path):
    write_whole(tmp_path / "new" / "text", "Äxte\n")
    write_whole(tmp_path / "bytes", b"\r\n\xff")
    assert content(tmp_path) == {"new/text": "Äxte\n".encode(), "bytes": b"\r\n\xff"}


def test_a_folder_is_removed_whole(tmp_path):
    """Also if an earlier removal was killed halfway; what it left is for `remove_leftovers`."""
    for name in ("run", ".run.0123abcd.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_folder(tmp_path / "run")
    assert os.listdir(tmp_path) == [".run.0123abcd.old"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("one line"), "one line"),
        (ValueError("\n  first:\nsecond"), "first"),
        (ValueError(""), "ValueError"),
        (MemoryError(), "MemoryError"),
        (ValueError(" \n "), "ValueError"),
    ],
)
def test_a_reason_is_one_line(error, reason):
    assert reason_of(error) == reason


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "a-b/c_d.e-1.5"])
def test_hub_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name)
    (tmp_path / name).mkdir(parents=True)
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["", "/abs/path", "./here", "../up", "a/b/c", "owner/", "~/x", "with space", "é/x", "a\n"]
)
def test_what_is_no_hub_id(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize("folder", ["a[1]", "[x]/b", "a*b", "a?b", "plain"])
def test_patterns_below_folders_whose_names_look_like_patterns(tmp_path, monkeypatch, folder):
    names = ["epoch-1", "epoch-2", "best[1]", "x"]
    for place in (folder, "a1", "x/b", "aXb"):
        for name in names:
            (tmp_path / place / name).mkdir(parents=True, exist_ok=True)
    for start in (f"{tmp_path}/", ""):
        monkeypatch.chdir(tmp_path)
        here = f"{start}{folder}"
        assert sorted(expand_pattern(f"{here}/epoch-*")) == [f"{here}/epoch-1", f"{here}/epoch-2"]
        assert sorted(expand_pattern(f"{here}/epoch-[12]")) == [f"{here}/epoch-1", f"{here}/epoch-2"]
        assert expand_pattern(f"{here}/best[1]") == [f"{here}/best[1]"]
        assert expand_pattern(f"{here}/none-*") == []
        assert expand_pattern(f"{here}/none") == [f"{here}/none"]
    assert sorted(expand_pattern("*")) == sorted({folder.split("/")[0], "a1", "x", "aXb"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a red axe --seed 3\nein Käter\n", "красный топор\nкот", "a\n红色的斧头\n"])
def test_files_of_prompts_in_utf_16_without_a_mark(tmp_path, encoding, text):
    (tmp_path / "prompts.txt").write_bytes(text.encode(encoding))
    found = read_prompts("--prompt", [str(tmp_path / "prompts.txt")])
    assert [prompt.line for prompt in found] == text.split("\n")[:2]


def test_a_file_of_prompts_in_another_encoding(tmp_path):
    file = tmp_path / "prompts.txt"
    for data in ("ein Käter".encode("latin-1"), b"a cat\0", b"\xff\xfea"):
        file.write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_prompts("--prompt", [str(file)])
        assert str(caught.value).startswith(f"--prompt {file}: it can't be read (it is not ")
        assert str(caught.value).endswith(" Save it again as UTF-8.")


ENTRIES = {
    "metrics.jsonl": (Path.mkdir, "a folder"),
    "pytorch_lora_weights.safetensors": (Path.mkdir, "a folder"),
    "report.html": (os.mkfifo, "a named pipe"),
    "checkpoint-4": (lambda path: path.symlink_to("/nowhere"), "a link that leads nowhere"),
    "about.json": (lambda path: path.symlink_to("/dev/null"), "a device"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_in_the_way_in_an_output_folder_is_refused_before_the_run(train, tmp_path, name):
    make, kind = ENTRIES[name]
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-2").mkdir()
    make(out / name)
    message = refusal_of(train, output_dir=out)
    assert message == f"{out / name}: it is {kind}. Remove it, or pass another --output_dir."
