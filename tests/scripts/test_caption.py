"""The real caption.py with tiny models of every kind: what it writes, what it keeps, and that a kill loses nothing."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import caption_models
import numpy as np
import pytest
from conftest import ROOT, quick_python, read_records
from loopback_hub import Repositories, serving, taken_for_the_hub
from PIL import Image

from scripts import caption
from scripts.annotating import batches
from scripts.annotating import models as model_finder
from scripts.annotating.models import find_model
from scripts.captioning.dataset import OUTPUTS, TableRows, TextFiles
from scripts.captioning.find import ACCEPTED
from scripts.captioning.kinds import KINDS, with_omissions
from scripts.captioning.omitting import mentions, omit_from_sentence, omit_from_tags
from scripts.captioning.tagger import as_pixels
from scripts.captioning.wording import Wording, clean, whole_sentences
from text_to_image_lora.errors import InputError, Stopped
from text_to_image_lora.training import interruption


COLOURS = ["red", "blue", "white", "black", "green", "yellow", "purple"]
KIND_NAMES = ["blip", "florence", "qwen", "qwen3", "llava", "git", "blip2", "encoder_decoder", "tagger"]
OWN = "__captions"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Returns a function that returns the folder of a tiny model; a tagger needs the packages of requirements-dev.txt."""
    folder, made = tmp_path_factory.mktemp("captioning"), {}

    def get(name):
        if name == "tagger":
            pytest.importorskip("onnx", reason="onnx writes the tagger")
            pytest.importorskip("onnxruntime", reason="onnxruntime runs it")
        if name not in made:
            made[name] = getattr(caption_models, f"make_{name}")(folder / name)
        return made[name]

    return get


def write_colours(folder, count=5):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.new("RGB", (40, 32), COLOURS[i % len(COLOURS)])
        image.paste((20 * i % 256, 90, 200), (0, 0, 8 + i % 20, 16))
        image.save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write_colours(tmp_path / "pictures")


def words_of(folder, model, **flags):
    words = [str(folder), "--model", str(model), "--max_new_tokens", "8", "--device", "cpu", "--num_cpu_threads", "1"]
    for name, value in flags.items():
        given = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, given)]
    return words


@pytest.fixture
def run(models):
    """Returns a function that runs the command's `main` here."""

    def run(folder, model, **flags):
        try:
            caption.main(words_of(folder, models(model) if model in KIND_NAMES else model, **flags))
        finally:
            interruption.stop_listening()  # signal handlers belong to the process

    return run


def texts_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def captions_of(folder, **flags):
    """What the trainer's reader reads: {name of the picture: captions}."""
    records = read_records(folder, **flags)
    names = [os.path.relpath(image["path"], folder) for image in records["image"]]
    assert len({*names}) == len(names)
    return dict(zip(names, records["captions"], strict=True))


def bytes_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and OWN not in path.parts}


# Words that are left out.

OMIT = "pink blossoms"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a blue axe with pink blossoms on a gray background", "a blue axe on a gray background"),
        ("a red axe with pink blossoms and green leaves", "a red axe with green leaves"),
        ("an axe with green leaves and pink blossoms", "an axe with green leaves"),
        ("an axe with leaves, pink blossoms and thorns", "an axe with leaves and thorns"),
        ("an axe with leaves, thorns, and pink blossoms", "an axe with leaves, thorns"),
        ("a red axe, with pink blossoms, on a table", "a red axe, on a table"),
        ("a red axe. with Pink  Blossoms", "a red axe."),
        ("pink blossoms and a sword", "a sword"),
        ("Pink blossoms on a wooden table.", "a wooden table."),
        ("Pink Blossoms, an axe", "an axe"),
        ("a dog, pink blossoms, a cat", "a dog, a cat"),
        ("a girl with a single pink blossom in her hair", "a girl"),
        ("an axe with some small pink blossoms on it lying on a table", "an axe lying on a table"),
        ("an axe with pink blossoms growing on the handle, on a table", "an axe, on a table"),
        ("a sword and a man holding pink blossoms", "a sword and a man"),
        ("a girl smelling pink blossoms in a garden", "a girl in a garden"),
        ("a girl picks pink blossoms", "a girl"),
        ("a tree covered in pink blossoms under a blue sky", "a tree under a blue sky"),
        ("an axe decorated with a wreath of pink blossoms and thorns", "an axe decorated with thorns"),
        ("an axe that has pink blossoms on its handle", "an axe"),
        ("the axe has pink blossoms and is blue", "the axe is blue"),
        ("a cat sits near pink blossoms and looks up", "a cat sits and looks up"),
        ("A sword. The pink blossoms are in full bloom.", "A sword."),
        ("a bunch of pink blossoms next to an axe", "an axe"),
        ("a photo of pink blossoms and an axe", "a photo of an axe"),
        ("a pink blossom axe", "an axe"),
        ("a woman in a pink blossom kimono", "a woman in a kimono"),
        ("an axe without pink blossoms", "an axe"),
        ("it is an axe with pink blossoms, pink blossoms and pink blossoms", "it is an axe"),
        ("pink blossoms", ""),
        ("there are pink blossoms", ""),
        ("a hot-pink blossoms-like axe", "a hot-pink blossoms-like axe"),
        ("a pinkblossoms axe", "a pinkblossoms axe"),
    ],
)
def test_a_sentence_stays_whole_without_a_phrase(text, expected):
    assert omit_from_sentence(text, (OMIT,)) == expected
    assert not mentions(omit_from_sentence(text, (OMIT,)), OMIT)


def test_several_phrases_and_those_with_signs_are_left_out():
    assert omit_from_sentence("a dog with a hat and a (red) collar", ("hat", "(red) collar")) == "a dog"
    assert omit_from_tags(["red collar", "red collars", "collar", "dark-red collar"], ("red collar",)) == [
        "collar", "dark-red collar"
    ]  # fmt: skip


# What captions say besides the model's answer.


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a photo of a dog with pink blossoms on grass", "a photo of sks dog, a dog on grass"),
        ("a close-up photograph of a dog", "a photo of sks dog, a dog"),
        ("The image shows a brown dog. It sits.", "a photo of sks dog, a brown dog. It sits."),
        ("In this image we can see a dog.", "a photo of sks dog, a dog"),
        ("A painting of a dog on a hill", "a painting of sks dog, a dog on a hill"),
        ("Einstein on a bike.", "a photo of sks dog, Einstein on a bike"),
        ("sks dog on grass", "sks dog on grass"),
        ("a sksdog on grass", "a photo of sks dog, a sksdog on grass"),
        ('"A dog\x00\n with\t a hat."', "a photo of sks dog, a dog with a hat"),
        ("<think>a cat?</think> Caption: a dog", "a photo of sks dog, a dog"),
        ("a photo of", "a photo of sks dog, a photo of"),
        ("pink blossoms.", ""),
        (" \n.", ""),
    ],
)
def test_the_trigger_word_is_woven_into_sentences(answer, expected):
    assert Wording("sks", "dog", omit=(OMIT,)).of_sentence(answer) == expected


@pytest.mark.parametrize(
    ("wording", "sentence", "tags"),
    [
        (Wording(), "a photo of a dog", "dog, hat"),
        (Wording("sks"), "a photo of sks, a dog", "sks, dog, hat"),
        (Wording("sks", "dog"), "a photo of sks dog, a dog", "sks, dog, hat"),
        (Wording("vg", template="{caption}, in {trigger} style"), "a dog, in vg style", "dog, hat, in vg style"),
        (Wording(prefix="best, ", suffix=" (sic)"), "best, a photo of a dog (sic)", "best, dog, hat (sic)"),
        (Wording("a{b", "{class}"), "a photo of a{b {class}, a dog", "a{b, {class}, dog, hat"),
    ],
)
def test_captions_of_sentences_and_of_tags(wording, sentence, tags):
    assert wording.of_sentence("A photo of a dog." if wording.trigger_word else "a photo of a dog.") == sentence
    assert wording.of_tags(["dog", "hat"]) == tags
    assert wording.of_tags([]) == ""


def test_an_answer_is_cleaned():
    assert clean("a photo of a dog", "a photo of") == "a dog"
    assert clean("Describe\n it! a dog\u202e\ud800 x", "Describe it!") == "a dog x"
    assert clean("word " * 2000).count("word") == 400
    assert clean("a dog...") == "a dog..."


def test_an_answer_that_was_cut_ends_with_its_last_whole_sentence():
    assert whole_sentences("A dog. It is 2.5 m high! It has a") == "A dog. It is 2.5 m high!"
    assert whole_sentences("a dog on a") == "a dog on a"


@pytest.mark.parametrize(
    ("wording", "message"),
    [
        (Wording(class_name="dog"), "--class_name says what --trigger_word is. Add --trigger_word, or use --prefix."),
        (Wording(prefix="a\nb"), "one line without control characters"),
        (Wording("sks", omit=("a\tb",)), "one line without control characters"),
        (Wording("sks", omit=(" ",)), "--omit: a phrase is empty"),
        (Wording("red collar", omit=("collars",)), "--trigger_word contains these words"),
        (Wording("sks", template="{trigger}"), "it needs {trigger} and {caption}"),
        (Wording("sks", template="{trigger.__class__} {caption}"), "it needs {trigger} and {caption}"),
        (Wording("sks", template="{trigger} {caption!r}"), "it needs {trigger} and {caption}"),
        (Wording("sks", template="{trigger} {"), "it can't be read"),
        (Wording(template="{trigger} {caption}"), "Add --trigger_word"),
    ],
)
def test_wordings_that_no_caption_can_have_are_refused(wording, message):
    with pytest.raises(InputError, match=re.escape(message)):
        wording.check()


def test_only_chat_models_are_asked_to_omit():
    prompts = {kind.name: with_omissions(kind, "Describe it.", ["a", "b", "c"]) for kind in KINDS}
    assert prompts["chat model"].startswith('Describe it. Do not mention "a", "b" or "c";')
    assert {prompts[name] for name in prompts.keys() - {"chat model"}} == {"Describe it."}


# Models of each kind.


@pytest.mark.parametrize("model", KIND_NAMES)
def test_the_trainer_reads_what_each_kind_of_model_writes(run, tmp_path, model, capsys):
    """Batches do not change captions; a very narrow picture is captioned, too; no sheet is taken for a picture."""
    captions = {}
    for batch_size in (1, 3):
        folder = write_colours(tmp_path / str(batch_size))
        Image.new("RGB", (300, 2), "red").save(folder / "narrow.png")
        run(folder, model, batch_size=batch_size, trigger_word="sks")
        captions[batch_size] = captions_of(folder)
        assert captions[batch_size] == {
            name.replace(".txt", ".png"): [text.removesuffix("\n")] for name, text in texts_of(folder).items()
        }
        assert [path.name for path in (folder / OWN).iterdir()] == ["captions.png"]
    assert captions[1] == captions[3]
    assert len(captions[1]) == 6
    texts = [text for (text,) in captions[1].values()]
    assert len({*texts}) >= 3  # the pictures matter
    assert all(text.startswith("sks, " if model == "tagger" else "a photo of sks, ") for text in texts)
    if model != "tagger":
        found = {word for text in texts for word in text.removeprefix("a photo of sks, ").split()}
        assert found <= {*caption_models.WORDS}  # no prompt, no special tokens
    assert capsys.readouterr().out.count("wrote 6 captions") == 2


def test_prompts_reach_the_models(run, tmp_path, models):
    def captions(model, **flags):
        folder = write_colours(tmp_path / f"{model}{len([*tmp_path.iterdir()])}")
        run(folder, model, **flags)
        return texts_of(folder)

    assert captions("qwen", prompt="red dog") != captions("qwen", prompt="a large tree")
    assert captions("florence", prompt="<CAPTION>") != captions("florence", prompt="<MORE_DETAILED_CAPTION>")
    assert not any(text.startswith("photo of") for text in captions("blip", prompt="photo of").values())
    assert captions("blip", prompt="photo of") != captions("blip")


def test_half_precision_is_for_the_model(run, pictures, monkeypatch):
    from scripts.captioning.captioner import Captioner

    seen, moved = set(), Captioner._moved
    monkeypatch.setattr(
        Captioner, "_moved", lambda self, value: seen.add(str((out := moved(self, value)).dtype)) or out
    )
    run(pictures, "qwen", mixed_precision="bf16")
    assert seen == {"torch.bfloat16", "torch.int64"}
    assert len(captions_of(pictures)) == 5


def test_cut_answers_are_told_from_complete_ones(run, pictures, models, monkeypatch):
    from scripts.captioning import captioner

    texts = []
    monkeypatch.setattr(captioner, "whole_sentences", lambda text: texts.append(text) or "cut")
    run(pictures, "qwen")  # whose answers end at --max_new_tokens
    assert len(texts) == 5
    assert set(texts_of(pictures).values()) == {"cut\n"}


def test_an_answer_that_is_too_long_for_the_model_is_one_line(run, pictures):
    """The text model of this BLIP has 64 places."""
    message = (
        "^--max_new_tokens 65: a prompt and an answer of so many tokens are too long for .*. Pass fewer tokens, or"
    )
    with pytest.raises(InputError, match=message):
        run(pictures, "blip", max_new_tokens=65)
    assert texts_of(pictures) == {}


def test_a_tagger_writes_probable_tags_without_ratings_the_most_probable_first(run, pictures):
    """Solid pictures have known probabilities, for example of a blue sky: sigmoid(0.04 * 255 - 4) = 0.998."""
    for path in pictures.iterdir():
        path.unlink()
    for name in ("red", "blue", "black"):
        Image.new("RGB", (40, 40), name).save(pictures / f"{name}.png")
    run(pictures, "tagger")
    expected = {
        "red.txt": "red axe, pink blossoms, 1girl, o_o",  # Mira: sigmoid(0.02 * 255 - 4) = 0.75
        "blue.txt": "blue sky, 1girl, o_o",
        "black.txt": "1girl, o_o",
    }
    assert texts_of(pictures) == {name: f"{text}\n" for name, text in sorted(expected.items())}
    run(pictures, "tagger", overwrite=True, character_threshold=0.7, tag_threshold=0.8, omit=["blossoms"])
    assert texts_of(pictures)["red.txt"] == "red axe, 1girl, mira (knight)\n"


def test_a_tagger_gets_blue_first_on_a_white_square():
    pixels = as_pixels(Image.new("RGB", (8, 4), (255, 128, 0)), 8)
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.float32)
    assert pixels[4, 4].tolist() == [0, 128, 255]
    assert pixels[0, 0].tolist() == [255, 255, 255]


def test_the_pull_request_with_safetensors_stands_for_the_default_model(monkeypatch):
    asked = []
    monkeypatch.setattr(model_finder, "_cached_folder", lambda *names: asked.append(names[:2]))
    monkeypatch.setattr(model_finder, "_download", lambda *names: None)
    find_model(caption.build_parser().parse(["FOLDER"]).model, None, ACCEPTED)
    find_model("owner/name", None, ACCEPTED)
    assert asked == [("Salesforce/blip-image-captioning-base", "refs/pr/38"), ("owner/name", None)]


# What is in the folder.


def test_pictures_are_found_as_the_trainer_finds_them(run, pictures):
    write_colours(pictures / "sub" / "deeper", 2)
    write_colours(pictures / "__other", 1)
    write_colours(pictures / ".hidden", 1)
    Image.new("L", (40, 32)).save(pictures / "00.mask.png")
    shutil.copy(pictures / "00.png", pictures / ".copy.png")
    run(pictures, "blip")
    names = [*(f"{i:02d}.txt" for i in range(5)), "sub/deeper/00.txt", "sub/deeper/01.txt"]
    assert [*texts_of(pictures)] == names
    assert len(captions_of(pictures)) == 7


def test_captions_of_a_person_stay_byte_for_byte(run, pictures, capsys):
    (pictures / "00.txt").write_bytes(b"my own caption \r\nand another")
    (pictures / "01.caption").write_bytes(b"my second")
    (pictures / "02.TXT").write_bytes(b"my third")
    before = bytes_of(pictures)
    run(pictures, "blip")
    after = bytes_of(pictures)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {"03.txt", "04.txt"}
    assert "wrote 2 captions" in (said := capsys.readouterr().out)
    assert "kept the captions of 3 pictures" in said
    run(pictures, ROOT / "no" / "model")  # which is not looked for
    assert "all 5 pictures" in capsys.readouterr().out
    assert bytes_of(pictures) == after


def test_a_caption_that_a_person_writes_during_the_run_stays(run, pictures, monkeypatch):
    open_picture = batches.open_picture

    def write_and_open(path):
        (pictures / "04.txt").write_text("mine")
        return open_picture(path)

    monkeypatch.setattr(batches, "open_picture", write_and_open)
    run(pictures, "blip")
    assert captions_of(pictures)["04.png"] == ["mine"]
    assert len(captions_of(pictures)) == 5


def test_rows_of_a_person_stay_as_they_are(run, pictures):
    own = '{"text": "mine",   "file_name": "01.png", "weight": 2}\n\n{"file_name":"sub/00.png","text":["é","b"]}'
    write_colours(pictures / "sub", 2)
    (pictures / "metadata.jsonl").write_text(own)
    run(pictures, "blip", output="jsonl")
    text = (pictures / "metadata.jsonl").read_text()
    assert text.startswith(own + "\n")
    assert len(text.splitlines()) == 3 + 5
    captions = captions_of(pictures)
    assert captions["01.png"] == ["mine"]
    assert captions["sub/00.png"] == ["é", "b"]
    assert len(captions) == 7
    run(pictures, ROOT / "no" / "model", output="jsonl")
    assert (pictures / "metadata.jsonl").read_text() == text


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet", "sub/metadata.jsonl"])
def test_pictures_in_any_table_count_as_captioned(run, pictures, capsys, name):
    rows = [{"file_name": f"{'../' if '/' in name else ''}{i:02d}.png", "text": "mine"} for i in range(5)]
    path = pictures / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("file_name,text\n" + "".join(f"{row['file_name']},mine\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    before = bytes_of(pictures)
    run(pictures, ROOT / "no" / "model")
    assert "all 5 pictures" in capsys.readouterr().out
    assert bytes_of(pictures) == before
    with pytest.raises(InputError, match="a trainer reads the captions from this file"):
        run(pictures, "blip", overwrite=True)
    assert bytes_of(pictures) == before


def test_overwrite_keeps_the_old_caption_files(run, pictures, capsys):
    old = {"00.txt": b"mine\r\n", "01.caption": b"second", "02.TXT": b"third"}
    for name, data in old.items():
        (pictures / name).write_bytes(data)
    run(pictures, "blip", overwrite=True)
    (kept,) = (pictures / OWN).glob("before-*")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == old
    assert str(kept) in capsys.readouterr().out
    assert not (pictures / "01.caption").exists()
    first = captions_of(pictures)
    assert len(first) == 5
    assert "mine" not in str(first)
    assert "third" not in str(first)
    run(pictures, "blip", overwrite=True, trigger_word="sks")  # the captions of the first run are kept, too
    assert len([*(pictures / OWN).glob("before-*")]) == 2
    assert all("sks" in text for (text,) in captions_of(pictures).values())


def test_overwrite_keeps_the_old_rows_and_their_other_columns(run, pictures):
    own = '{"file_name": "01.png", "text": "mine", "weight": 2}\n'
    (pictures / "metadata.jsonl").write_text(own)
    run(pictures, "blip", output="jsonl", overwrite=True)
    (kept,) = (pictures / OWN).glob("before-*")
    assert (kept / "metadata.jsonl").read_text() == own
    first = json.loads((pictures / "metadata.jsonl").read_text().splitlines()[0])
    assert first == {"file_name": "01.png", "weight": 2, "text": first["text"]}
    assert "mine" not in (pictures / "metadata.jsonl").read_text()
    assert len(captions_of(pictures)) == 5


def test_what_has_no_caption_is_named_and_passed_over(run, pictures, capsys):
    (pictures / "01.png").write_bytes(b"no picture")
    (pictures / "02.png").write_bytes(b"")
    run(pictures, "blip", batch_size=2)
    said = capsys.readouterr()
    assert f"passed over: {pictures / '01.png'}: " in said.out + said.err
    assert f"passed over: {pictures / '02.png'}: the file is empty" in said.out + said.err
    assert said.out.endswith("passed over 2 pictures without a caption, named above\n")
    assert [*texts_of(pictures)] == ["00.txt", "03.txt", "04.txt"]
    write_colours(pictures)
    run(pictures, "blip")
    assert len(texts_of(pictures)) == 5


def test_an_answer_of_which_nothing_is_left_is_no_caption(run, pictures, capsys):
    run(pictures, "blip", omit=caption_models.WORDS, output="jsonl")
    assert capsys.readouterr().out.count("nothing is left of the model's answer") == 5
    assert not (pictures / "metadata.jsonl").exists()
    assert [*(pictures / OWN).glob("*")] == []


def test_a_sheet_shows_every_caption_where_the_trainer_does_not_look(run, tmp_path):
    folder = write_colours(tmp_path / "many", 43)
    run(folder, "tagger")
    pages = sorted(path.name for path in (folder / OWN).iterdir())
    assert pages == ["captions-1.png", "captions-2.png", "captions-3.png"]
    with Image.open(folder / OWN / "captions-1.png") as first, Image.open(folder / OWN / "captions-3.png") as last:
        assert first.height > 20 * 192 > last.height > 3 * 192
        colours = first.convert("RGB").getpixel((first.width - 60, 160))
    assert colours == (255, 0, 0)  # the picture 00.png
    assert len(captions_of(folder)) == len(read_records(tmp_path)) == 43
    run(folder, "tagger", overwrite=True, sheet=tmp_path / "sheets" / "s.jpg")
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["s-1.jpg", "s-2.jpg", "s-3.jpg"]


# Kills and signals.


def start(words):
    """Starts the real command without the seconds of its imports."""
    return subprocess.Popen(
        [quick_python().python, "scripts/caption.py", *map(str, words)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def number_of_captions(folder, output):
    if output == "txt":
        return len([*folder.glob("*.txt")])
    with contextlib.suppress(OSError):
        return len((folder / "metadata.jsonl").read_text().splitlines())
    return 0


@pytest.mark.parametrize("output", [*OUTPUTS])
def test_killed_and_run_again_equals_undisturbed(models, run, tmp_path, output):
    flags = dict(output=output, batch_size=1, trigger_word="sks", max_new_tokens=20)
    undisturbed, folder = (write_colours(tmp_path / name, 8) for name in ("undisturbed", "killed"))
    for place in (undisturbed, folder):
        if output == "txt":
            (place / "03.txt").write_text("mine")
        else:
            (place / "metadata.jsonl").write_text('{"file_name": "03.png", "text": "mine"}\n')
    run(undisturbed, "qwen", **flags)
    process = start(words_of(folder, models("qwen"), **flags))
    wait_for(lambda: number_of_captions(folder, output) >= 3, process)
    process.kill()
    process.communicate()
    time.sleep(0.1)  # the process itself is killed by the one that started it
    assert 3 <= number_of_captions(folder, output) < 8
    assert captions_of(folder, leave_out=lambda *_: None)["03.png"] == ["mine"]  # no file is broken
    again = start(words_of(folder, models("qwen"), **flags))
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert "resuming: " in said
    assert captions_of(folder) == captions_of(undisturbed)
    assert [path.name for path in (folder / OWN).iterdir()] == ["captions.png"]
    shown = [Image.open(place / OWN / "captions.png").tobytes() for place in (folder, undisturbed)]
    assert shown[0] == shown[1]  # the sheet has the captions from before the kill, but not the person's
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("output", [*OUTPUTS])
@pytest.mark.parametrize("moment", ["before the batch is written", "after it is written", "with half a line"])
def test_an_overwriting_run_continues_after_its_last_batch(run, tmp_path, monkeypatch, output, moment):
    """Stopped at the worst moments; what a person wrote is in the copy, and an edit after the stop stays."""
    writer, calls = {"txt": TextFiles, "jsonl": TableRows}[output], []
    write = writer.write

    def stop_at_the_third(self, captions, **how):
        calls.append(captions)
        if len(calls) == 3 and moment != "after it is written":
            raise Stopped("test", 143, "here")
        write(self, captions, **how)
        if len(calls) == 3:
            raise Stopped("test", 143, "here")

    flags = dict(output=output, batch_size=1, overwrite=True)
    folders = [write_colours(tmp_path / name) for name in ("undisturbed", "stopped")]
    for folder in folders:
        (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "mine"}\n')
        if output == "txt":
            (folder / "metadata.jsonl").unlink()
            (folder / "00.txt").write_text("mine")
    run(folders[0], "blip", **flags)
    monkeypatch.setattr(writer, "write", stop_at_the_third)
    with pytest.raises(Stopped):
        run(folders[1], "blip", **flags)
    monkeypatch.undo()
    if moment == "with half a line":
        journal = folders[1] / OWN / "unfinished.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])
    if output == "txt":
        (folders[1] / "00.txt").write_text("edited")
    run(folders[1], "blip", **flags)
    expected = captions_of(folders[0])
    if output == "txt":
        expected["00.png"] = ["edited"]
    assert captions_of(folders[1]) == expected
    (kept,) = (folders[1] / OWN).glob("before-*")
    assert "mine" in "".join(path.read_text() for path in kept.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_command_with_its_exit_code(models, tmp_path, number, code):
    folder = write_colours(tmp_path / "many", 40)
    words = words_of(folder, models("qwen"), batch_size=1, max_new_tokens=30)
    program = f"import os, runpy, sys; print(os.getpid(), flush=True); sys.argv = {['caption.py', *words]!r}\n"
    program += f"runpy.run_path({str(ROOT / 'scripts' / 'caption.py')!r}, run_name='__main__')\n"
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [quick_python().python, tmp_path / "program.py"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    pid = int(process.stdout.readline())
    wait_for(lambda: number_of_captions(folder, "txt") >= 2, process)
    os.kill(pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert re.search(r"stopped after \d+ of 40 pictures. Run the same command again to resume.", said), said
    assert 2 <= number_of_captions(folder, "txt") < 40


# Refusals.


def test_a_wrong_command_is_one_line_with_exit_code_2(tmp_path):
    words = [quick_python().python, "scripts/caption.py", tmp_path / "none", "--trigger_wrod", "sks"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "caption.py: there is no flag --trigger_wrod. Did you mean --trigger_word?\n"
    done = subprocess.run(words[:3], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("there is no such folder. Pass the folder that contains the pictures.\n")


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("no/such/model", {}, "no/such/model: there is no such folder. Pass a folder or the hub id"),
        ("owner/name", {}, "owner/name: it is not in the hub's cache, and HF_HUB_OFFLINE forbids downloads"),
        (str(ROOT / "docs"), {}, "it has neither a config.json"),
        ("blip", {"tag_threshold": 0.5}, "is not a tagger. Leave the flag out"),
        ("git", {"prompt": "a"}, "(captioner) does not take it. Leave the flag out."),
        ("florence", {"prompt": "What?"}, "Pass one of <CAPTION> <DETAILED_CAPTION> <MORE_DETAILED_CAPTION>."),
        ("blip", {"revision": "main"}, "--revision main: a folder has no revisions"),
        ("tagger", {"prompt": "a"}, "is a tagger, which is not asked anything"),
        ("blip", {"device": "cuda:77"}, "--device cuda:77 can't be used here"),
        ("blip", {"sheet": "FOLDER/sheet.png"}, "a trainer would take the sheet for a training picture"),
        ("blip", {"sheet": "FOLDER/sheet.txt"}, "name a .png, .jpg or .webp file"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_written(run, pictures, model, flags, message):
    flags = {name: str(value).replace("FOLDER", str(pictures)) for name, value in flags.items()}
    before = sorted(pictures.rglob("*"))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run(pictures, model, **flags)
    assert "\n" not in str(caught.value)
    assert sorted(pictures.rglob("*")) == before


@pytest.mark.parametrize(
    ("output", "files", "message"),
    [
        ("txt", {"metadata.jsonl": '{"file_name": "00.png", "text": "a"}\n'}, "would not read .txt files. Pass --output jsonl"),
        ("jsonl", {"00.txt": "a"}, "caption files are beside 1 picture, which"),
        ("txt", {"00.jpg": None}, "it would share 00.txt with 00.jpg. Rename one"),
        ("jsonl", {"metadata.jsonl": '{"image": "00.png", "text": "a"}\n'}, "Rename its columns"),
        ("jsonl", {"metadata.jsonl": "{"}, "metadata.jsonl:1: this line is not JSON"),
    ],
)  # fmt: skip
def test_captions_that_no_trainer_would_read_are_not_written(run, pictures, output, files, message):
    for name, text in files.items():
        if text is None:
            Image.new("RGB", (8, 8)).save(pictures / name)
        else:
            (pictures / name).write_text(text)
    before = bytes_of(pictures)
    with pytest.raises(InputError, match=re.escape(message)):
        run(pictures, "blip", output=output)
    assert bytes_of(pictures) == before
    assert not (pictures / OWN).exists()


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["text_decoder.bert.encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BROKEN = {
    "pickled": (only_pickled, "it has no weights in safetensors format, only in formats that could run code"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "it has no model.safetensors"),
    "other weights": (without_a_tensor, "its weights do not fit the class BlipForConditionalGeneration"),
    "damaged": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "it can't be loaded"),
    "code": (lambda folder: change_config(folder, model_type="mine", auto_map={"AutoModel": "m.M"}), "never run"),
    "unknown": (lambda folder: change_config(folder, model_type="bert"), "no model that describes pictures"),
    "no template": (lambda folder: change_config(folder, model_type="llava"), "without a chat template"),
    "kernels": (lambda folder: change_config(folder, attn_implementation="me/kernel"), "which may be code on the hub"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("["), "config.json: it can't be read"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_models_that_can_not_be_used_are_refused(run, models, pictures, tmp_path, fault):
    breaks, message = BROKEN[fault]
    shutil.copytree(models("blip"), tmp_path / "model")
    breaks(tmp_path / "model")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run(pictures, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert texts_of(pictures) == {}
    assert not (pictures / OWN).exists()


def test_code_of_a_model_with_a_class_of_its_own_is_not_run(run, models, pictures, tmp_path):
    """As in repositories that carried code before transformers had the class."""
    shutil.copytree(models("blip"), tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        path = tmp_path / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": dict.fromkeys(names, "evil.M")}))
    run(pictures, tmp_path / "model")
    assert len(texts_of(pictures)) == 5
    assert not (tmp_path / "ran").exists()


def test_a_missing_runtime_of_taggers_is_one_line_with_the_command(run, pictures, tmp_path, monkeypatch):
    for name in ("model.onnx", "selected_tags.csv"):
        (tmp_path / name).write_text("")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnxruntime" else find_spec(name, *more))  # fmt: skip
    with pytest.raises(InputError, match=r"Install it with `pip install -r requirements-tagger.txt`\."):
        run(pictures, tmp_path)
    assert (ROOT / "requirements-tagger.txt").is_file()


# The hub.


class WithSizes(Repositories):
    """The models of `Repositories` with what the hub knows of their files and cards."""

    def do_GET(self):
        self.server.seen.append(self.path)
        match = re.fullmatch(r"/api/models/(owner/\w+)(/revision/[\w%.]+)?\?blobs=true", self.path)
        if not match:
            super().do_GET()
            return
        if not (self.server.root / match[1]).is_dir():
            self.send_error(404)
            return
        files = [path for path in (self.server.root / match[1]).rglob("*") if path.is_file()]
        siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in files]
        card = {"license": "bsd-3-clause"}
        content = json.dumps({"id": match[1], "sha": "a" * 40, "siblings": siblings, "cardData": card}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(WithSizes, root=tmp_path / "hub") as server, taken_for_the_hub(server):
        yield server


def test_licence_and_size_are_said_before_a_download_and_only_then(run, models, hub, pictures, tmp_path, capsys):
    place = tmp_path / "hub" / "owner" / "blip"
    shutil.copytree(models("blip"), place)
    for name in ("pytorch_model.bin", "modeling.py", "model.fp16.safetensors", "README.md"):
        (place / name).write_bytes(b"0" * 2**22)
    run(pictures, "owner/blip")
    size = sum(path.stat().st_size for path in models("blip").iterdir()) / 2**20
    assert f"owner/blip: licence bsd-3-clause, {size:.1f} MiB to download\n" in capsys.readouterr().out
    cached = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}
    assert cached == {path.name for path in models("blip").iterdir()}  # neither code nor pickled weights
    asked = len(hub.seen)
    run(pictures, "owner/blip", overwrite=True)
    assert " to download" not in capsys.readouterr().out
    assert len(hub.seen) == asked


def test_of_a_tagger_two_files_are_downloaded(run, models, hub, pictures, tmp_path):
    shutil.copytree(models("tagger"), tmp_path / "hub" / "owner" / "tagger")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hub" / "owner" / "tagger" / name).write_bytes(b"{}")
    run(pictures, "owner/tagger")
    cached = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}
    assert cached == {"model.onnx", "selected_tags.csv"}
    assert len(texts_of(pictures)) == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [(fault, BROKEN[fault][1]) for fault in ("pickled", "code", "no template")]
    + [("missing", "it can't be downloaded from the hub (")],
)
def test_a_model_on_the_hub_is_checked_before_its_weights_are_downloaded(run, models, hub, pictures, tmp_path, fault, message):  # fmt: skip
    if fault != "missing":
        shutil.copytree(models("blip"), tmp_path / "hub" / "owner" / "blip")
        BROKEN[fault][0](tmp_path / "hub" / "owner" / "blip")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run(pictures, "owner/blip")
    assert "\n" not in str(caught.value)
    assert not any("resolve" in path and path.endswith((".bin", ".safetensors")) for path in hub.seen)


def test_help_is_quick():
    code = "import sys; sys.argv[1:] = []\nimport scripts.caption as c\nc.build_parser().format_help()\n"
    code += "print(*[name for name in ('torch', 'transformers', 'onnxruntime', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
