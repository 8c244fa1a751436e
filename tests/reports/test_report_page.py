"""report.html: its contents for real runs, that it needs no other file, and that captions cannot inject scripts."""

import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from array import array
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import ROOT, read_metrics, train_script, write_pictures
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from text_to_image_lora import files
from text_to_image_lora.command_line import flag_values
from text_to_image_lora.errors import InputError, Stopped
from text_to_image_lora.reports import about, curves, dashboard, metrics, panels, report_page, runs, sample_pictures
from text_to_image_lora.reports.numbers import Curve, read_numbers


pytest.importorskip("bokeh", reason="without Bokeh there are no curves: pip install -r requirements.txt")

EVIL = "<script>alert(1)</script> an \"axe\" & 'spear' {{ 7 * 7 }}"
PROMPTS = ["a red axe", f"a blue axe {EVIL}"]
SECRET = "hf_TopSecretTokenOfTheTest"


class Reader(HTMLParser):
    """Parses the texts, scripts and URLs of a page."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.sources, self.links, self.scripts, self.text, self.images, self.within = [], [], [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.within.append(tag)
        if tag == "script":
            self.scripts.append("")
        if "src" in attributes:
            self.sources.append(attributes["src"])
        if "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.within:
            self.scripts[-1] += data
        elif "style" not in self.within:
            self.text += data

    @property
    def words(self):
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def finished(train_in, tmp_path_factory):
    """A run of six steps with two validations, and final, best and per-epoch LoRA files; with its output."""
    folder, pages = tmp_path_factory.mktemp("finished"), []
    write_pictures(folder / "pictures", count=8, captions=[EVIL, "a red axe", "a blue axe"])
    (folder / "pictures" / "bad.png").write_text("no picture")
    rows = (folder / "pictures" / "metadata.jsonl").read_text()
    (folder / "pictures" / "metadata.jsonl").write_text(
        rows + json.dumps({"file_name": "bad.png", "text": "x"}) + "\n"
    )
    said, write_page = io.StringIO(), report_page.write_page

    def keep(output_dir):
        path = write_page(output_dir)
        pages.append(Reader(path).words)
        return path

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(report_page, "write_page", keep)
        patch.setattr(metrics, "PAGE_PAUSE", 0)
        patch.setattr(metrics, "PAGE_SHARE", 0)
        out = train_in(
            folder, output_dir=folder / "my <b>lora", validation_split=0.3, validation_steps=3, max_train_steps=6, rank=2,
            learning_rate=0.03,
            validation_prompts=PROMPTS, num_validation_images=2, save_every_n_epochs=1, output_kohya_format=True,
            skip_bad_images=True, hub_token=SECRET, seed=5, validation_inference_steps=1,
        )  # fmt: skip
    return SimpleNamespace(out=out, said=said.getvalue(), pages=pages, page=Reader(out / report_page.FILE))


def test_the_answer_is_the_judges_own(finished):
    (sentence,) = re.findall(r"Validation: (.*)", finished.said)
    assert sentence[1:] in finished.page.words
    answer = runs.make_answer(runs.read_run(finished.out))
    assert answer.finished
    last = [row for row in read_metrics(finished.out) if "validation/loss" in row][-1]
    assert answer.best_step == last["validation/best_step"]
    assert answer.gain == pytest.approx(100 * (1 - last["validation/best_relative_loss"]))
    assert f"{answer.gain:.1f}%less loss than the base model" in finished.page.words.replace("% less", "%less")
    assert answer.take.place == "best"
    assert answer.take.step == answer.best_step
    assert "best/pytorch_lora_weights.safetensors" in finished.page.words


def test_all_files_that_the_page_names_are_there(finished):
    files = [link for link in finished.page.links if not link.startswith(("#", "data:"))]
    assert {"pytorch_lora_weights.safetensors", "epoch-0001/pytorch_lora_weights.safetensors"} <= set(files)
    assert any(link.startswith("best/") and "pytorch" not in link for link in files)  # the kohya file
    assert len([link for link in files if link.endswith(".png")]) == 4 * (1 + 2)
    for link in files:
        assert (finished.out / unquote(link)).is_file(), link


def test_each_prompt_and_seed_has_base_and_lora_at_each_step(finished):
    samples = [image["alt"] for image in finished.page.images if image["alt"]]
    expected = [
        f"{name}, step {step}: {prompt}"
        for prompt in PROMPTS
        for _ in range(2)
        for name, step in (("base", 0), ("LoRA", 3), ("LoRA", 6))
    ]
    assert samples == expected
    for prompt in PROMPTS:
        for seed in (5, 6):
            assert f"{prompt} seed {seed}" in finished.page.words
    for image in finished.page.images:
        data = runs.about.decode_image(image["src"])
        assert (data.format, data.size) == ("WEBP", (32, 32))


def test_captions_and_names_are_escaped(finished):
    assert EVIL in finished.page.text
    assert "my <b>lora" in finished.page.words
    assert len(finished.page.scripts) == 3  # the numbers, BokehJS, ours
    assert not any("alert(1)" in script for script in finished.page.scripts)


def test_the_page_needs_nothing_else(finished):
    assert finished.page.sources
    assert all(source.startswith("data:image/webp;base64,") for source in finished.page.sources)
    assert not [link for link in finished.page.links if "//" in link]
    text = (finished.out / report_page.FILE).read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:;" in text
    assert not re.search(r"<link[^>]*stylesheet|@import|url\(", text.split("<script")[0])


def test_the_command_makes_the_same_run(finished):
    command = runs.read_run(finished.out).about["command"]
    shown = [Path(word).name if Path(word).is_absolute() else word for word in shlex.split(command)]
    assert shlex.join(shown) in finished.page.text  # the page may be shared
    words = shlex.split(command)
    assert words[:2] == ["accelerate", "launch"]
    words = words[words.index("train_text_to_image_lora.py") + 1 :]
    again = flag_values(train_script.parse_settings(words))
    for name, value in {"rank": 2, "seed": 5, "max_train_steps": 6, "validation_prompts": PROMPTS, "hub_token": None,
                        "validation_split": 0.3, "skip_bad_images": True, "learning_rate": 0.03}.items():  # fmt: skip
        assert again[name] == value
    assert SECRET not in (finished.out / report_page.FILE).read_text(encoding="utf-8")
    assert SECRET not in (finished.out / "about.json").read_text(encoding="utf-8")


def test_the_data_sheet_tells_what_was_trained_on_and_what_was_not(finished):
    state = runs.read_run(finished.out).about
    count, held_out = state["dataset"]["pictures"], state["dataset"]["validated"]
    assert (count + held_out, held_out > 0) == (8, True)
    assert f"{count} pictures with {count} captions" in finished.page.words
    assert f"{held_out} more held out for validation" in finished.page.words
    assert "bad.png" in finished.page.words
    assert f"Fingerprint of pictures, captions and their order: {state['settings']['dataset']}" in finished.page.words
    assert state["versions"]["torch"].split("+")[0] in finished.page.words
    assert "40x32 → 32x32" in finished.page.words


def test_it_is_written_during_the_run(finished):
    progress = [re.search(r"(Step \d of 6, not finished|Finished at step \d)\.", page)[1] for page in finished.pages]
    assert progress[0] == "Step 0 of 6, not finished"
    assert "Step 3 of 6, not finished" in progress
    assert progress[-1] == "Finished at step 6"


def test_a_page_that_cannot_be_written_stops_nothing(train, monkeypatch, capsys):
    def fail(output_dir):
        raise OSError("no room")

    monkeypatch.setattr(report_page, "write_page", fail)
    out = train(max_train_steps=1)
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert "report.html could not be updated: no room" in capsys.readouterr().out


def test_a_run_that_is_stopped_leaves_its_page(train, tmp_path, monkeypatch):
    put = metrics.StepMetrics.put

    def put_and_ask(reports, step, *values, **how):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        put(reports, step, *values, **how)

    monkeypatch.setattr(metrics.StepMetrics, "put", put_and_ask)
    with pytest.raises(Stopped):
        train(max_train_steps=1000, validation_prompts=PROMPTS[:1], validation_inference_steps=1)
    words = Reader(tmp_path / "out" / report_page.FILE).words
    (step,) = re.findall(r"Step (\d+) of 1000, not finished", words)
    assert int(step) == read_metrics(tmp_path / "out")[-1]["step"] >= 3
    assert f"LoRA, step {step}" not in words


def test_a_tracker_that_fails_leaves_the_page_whole(train, monkeypatch, capsys):
    pytest.importorskip("wandb")

    def fail(*_, **__):
        raise OSError("no such host")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(panels.Wandb, "make_table", fail)
    out = train(report_to="wandb", validation_prompts=PROMPTS[:1], validation_inference_steps=1)
    assert capsys.readouterr().err.count("wandb failed (no such host): the run continues without it") == 1
    assert "Finished at step 2." in Reader(out / report_page.FILE).words


def test_equal_prompts_with_other_settings_are_shown_each(train):
    lines = ["a red axe --guidance_scale 2", "a red axe --guidance_scale 9"]
    out = train(validation_prompts=lines, num_validation_images=1, validation_inference_steps=1)
    assert [len(pictures) for pictures in runs.read_run(out).pictures.values()] == [2, 2]


def test_private_folders_are_removed_from_paths(tmp_path, monkeypatch):
    here, home = tmp_path / "work", tmp_path / "own"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    other = f"/mnt{here}/pictures /x{here}/y"  # another disk with folders of the same names
    assert files.shorten_paths(other) == other
    assert files.shorten_paths(f"--train_data_dir={here}/a,{home}/b") == "--train_data_dir=a,~/b"
    shortened = files.shorten_paths({"a": [f"{here}/pictures", 3], "b": f"left out: {home}/x.png", "c": "/data/y"})
    assert shortened == {"a": ["pictures", 3], "b": "left out: ~/x.png", "c": "/data/y"}
    dataset = {"notes": [f"left out: {here}/x.png"], "shown": [{"preview": f"data:image/webp;base64,AA{here}/BB"}]}
    settings = {"train_data_dir": [f"{here}/pictures"], "dataset": "0123"}
    written = about.write_about(tmp_path, flags={}, command="", settings=settings, machine={}, dataset=dataset)
    assert written["settings"]["train_data_dir"] == ["pictures"]
    assert written["dataset"] == {"notes": ["left out: x.png"], "shown": dataset["shown"], "fingerprint": "0123"}


@pytest.mark.parametrize(
    ("device", "processes", "launcher"),
    [
        ("cpu", 1, "accelerate launch --config_file accelerate_config.yaml"),
        ("cpu", 2, "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2"),
        ("cuda", 8, "accelerate launch --config_file accelerate_config.yaml --multi_gpu --num_processes 8"),
    ],
)
def test_the_command_starts_as_many_processes(device, processes, launcher):
    accelerator = SimpleNamespace(device=SimpleNamespace(type=device), num_processes=processes)
    command = about.command_line(
        "train.py", ["--instance_prompt", "an axe", "--output_dir", "~/my runs/a"], accelerator
    )
    assert command == f"{launcher} train.py --instance_prompt 'an axe' --output_dir ~/'my runs/a'"


def test_a_run_without_held_out_pictures_says_how_to_choose(train, capsys):
    out = train(max_train_steps=1)
    assert (
        "could not be updated" not in capsys.readouterr().out
    )  # nor before the first step, when there are no metrics yet
    page = Reader(out / report_page.FILE)
    assert runs.NOT_JUDGED in page.words
    assert "overfitting since" not in page.words
    assert runs.make_answer(runs.read_run(out)).take.place == ""


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """A copy of the run with another rank and other losses, and without about.json."""
    out = tmp_path_factory.mktemp("others") / "other"
    shutil.copytree(finished.out, out)
    (out / "about.json").unlink()
    flags = (out / "run.yaml").read_text().replace("rank: 2", "rank: 16")
    (out / "run.yaml").write_text(flags)
    rows = read_metrics(out)
    for row in rows:
        if "validation/best_relative_loss" in row:
            row["validation/best_relative_loss"] /= 2
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_several_runs_are_compared(finished, other, tmp_path):
    path = report_page.write_comparison([finished.out, other], tmp_path / "both.html", "both")
    page = Reader(path)
    assert "rank 16 did best." in page.words
    assert page.words.index("rank 16 other") < page.words.index("rank 2 my <b>lora")
    charts = json.loads(page.scripts[0])
    assert [line["label"] for line in charts[0]["lines"]] == ["rank 16", "rank 2"]
    films = [image["alt"].partition(",")[0] for image in page.images[:5]]
    assert films == ["base", "rank 16", "rank 16", "rank 2", "rank 2"]
    assert "No two runs drew" not in page.words
    for link in page.links:
        assert link.startswith(("#", "data:")) or (tmp_path / unquote(link)).resolve().is_file()


def test_differences_are_those_of_the_configuration():
    settings = [dict(rank=4, seed=0, output_dir="a"), dict(rank=16, seed=0, output_dir="b", use_dora=True)]
    assert report_page.find_differences(settings) == [("rank", [4, 16]), ("use_dora", ["", True])]


def test_runs_are_labelled_by_what_differs_if_that_is_short():
    def labels(*flags):
        found = [
            SimpleNamespace(name=f"run-{number}", folder=Path("runs") / f"run-{number}")
            for number in range(len(flags))
        ]
        return report_page._label_runs(found, report_page.find_differences(flags))

    assert labels(dict(rank=4, seed=1), dict(rank=16, seed=2)) == ["rank 4", "rank 16"]
    assert labels(dict(seed=1), dict(seed=2)) == ["seed 1", "seed 2"]
    seeds = dict(rank=4, seed=1), dict(rank=4, seed=2), dict(rank=8, seed=1)
    assert labels(*seeds) == ["rank 4, seed 1", "rank 4, seed 2", "rank 8, seed 1"]
    assert labels(dict(a=1, b=1, c=1, d=1), dict(a=2, b=2, c=2, d=2)) == ["run-0", "run-1"]
    assert labels(dict(rank=4), dict(rank=4)) == ["run-0", "run-1"]


def test_the_command_writes_the_page_of_a_run_and_of_a_folder_of_runs(finished, other, tmp_path, monkeypatch, capsys):
    from scripts import report

    (finished.out / report_page.FILE).unlink()
    report.main([str(finished.out)])
    assert Reader(finished.out / report_page.FILE).words.startswith("my <b>lora")
    for number, folder in enumerate((finished.out, other)):
        shutil.copytree(folder, tmp_path / "sweep" / f"trial-{number:04d}")
    report.main([str(tmp_path / "sweep")])
    page = Reader(tmp_path / "sweep" / report_page.FILE)
    assert "rank 16 did best." in page.words
    assert "rank 16 trial-0001" in page.words
    assert "trial-0000/report.html" in page.links
    report.main([str(finished.out), str(other), "--output", str(tmp_path / "both.html")])
    assert "rank 16 did best." in Reader(tmp_path / "both.html").words
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'both.html'}"


def test_settings_are_written_as_flags_and_derived_ones_are_marked(finished):
    """Lists are not Python's, and a value that the run computed is told from one that was given."""
    text = (finished.out / report_page.FILE).read_text(encoding="utf-8")
    rows = re.findall(
        r'<tr><td>(\w[\w ]*)</td><td class="long">([^<]*)</td><td class="quiet">(derived)?</td></tr>', text
    )
    found = {name: (value, mark) for name, value, mark in rows}
    assert found["rank"] == ("2", "")
    assert found["skip_bad_images"] == ("true", "")
    assert found["lora_alpha"] == ("2", "derived")
    assert found["target_modules"] == ("to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2", "derived")
    assert found["max_train_steps"] == ("6", "")
    assert found["lr_warmup_steps"][1] == "derived"
    assert not [value for value, _ in found.values() if value.startswith("[") or value in ("True", "False")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "there is no run in it"),
        (["{run}", "--output", "x.html"], "the page of a single run is written to its folder"),
    ],
)
def test_a_wrong_command_is_explained_in_one_line(finished, tmp_path, words, message):
    words = [word.format(run=finished.out) for word in words]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "report.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.fullmatch(rf"report.py: .*{message}.*\n", done.stderr)


@pytest.mark.long
def test_a_long_run_stays_small(tmp_path):
    """800 steps and 60 pictures of 512 pixels, with more detail than photographs."""
    rng = np.random.default_rng(0)
    rows = [{"step": step, "train_loss": 0.1 / step, "lr": 1e-4, "grad_norm": rng.random(), "epoch": step / 9,
             "images_per_second": 3.21, "peak_memory_gib": 7.5} for step in range(1, 801)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(0, 801, 80)[:10]:
        images = {}
        for k in range(6):
            noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            images[f"prompt-00-{k}"] = (
                noise.resize((512, 512), Image.Resampling.BICUBIC),
                {"prompt": "noise", "seed": k},
            )
        sample_pictures.save_pictures(tmp_path / "validation" / f"step-{step:06d}", images)
    path = report_page.write_page(tmp_path)
    assert path.stat().st_size < 10e6
    page = Reader(path)
    assert len(page.images) == 60
    assert "pictures; all of them are in validation/" not in page.words
    assert [line["x"][-1] for chart in json.loads(page.scripts[0]) for line in chart["lines"]] == [800] * 6
    start = time.process_time()
    report_page.write_page(tmp_path)  # the second time, the previews are cached
    assert time.process_time() - start < 1


def test_curves_are_thinned_by_means():
    curve = Curve(array("q", range(1, 10_001)), array("d", [step % 2 for step in range(1, 10_001)]))
    steps, values = curves.thin_out(curve)
    assert len(steps) <= curves.MAX_POINTS
    assert steps[-1] == 10_000
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)
    assert curves.thin_out(Curve(curve.steps[:3], curve.values[:3])) == ([1, 2, 3], [1.0, 0.0, 1.0])
    each = 13  # steps per point; 12 would give more than 800 points
    means = [np.mean(curve.values[place : place + each]) for place in range(0, 10_000, each)]
    assert values == pytest.approx(means, rel=1e-4)


def test_unknown_metrics_have_a_chart_too(tmp_path):
    rows = [{"step": step, "train_loss": 1.0, "perceptual": 2.0, "validation/gap": 0.0, "lr": None} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = read_numbers(tmp_path)
    assert [chart["title"] for chart in curves.make_charts(numbers.curves)] == ["Training loss", "perceptual"]


def axis_of(title, **columns):
    made = {name: Curve(array("q", range(1, len(values) + 1)), array("d", values)) for name, values in columns.items()}
    return {chart["title"]: chart for chart in curves.make_charts(made)}[title]["axis"]


def test_a_run_that_diverged_does_not_flatten_the_relative_losses():
    title = "Loss relative to the base model"
    assert axis_of(title, **{"validation/relative_loss": [1.0, 0.9, 310.0]}) == [pytest.approx(0.855), 2]
    assert axis_of(title, **{"validation/relative_loss": [1.0, 1.2, 2.5]}) == [0.95, 2]
    assert axis_of(title, **{"validation/relative_loss": [1.0, 1.9, 0.8]}) is None
    assert axis_of(title, **{"validation/relative_loss": [5.0, 7.0]}) is None  # nothing would be shown
    assert axis_of("Learning rate", lr=[1.0, 310.0]) is None
    runs = {"good": [1.0, 0.7], "diverged": [1.0, 40.0]}
    numbers = {
        run: {"validation/relative_loss": Curve(array("q", (1, 2)), array("d", each))} for run, each in runs.items()
    }
    chart, *_ = curves.make_comparison_charts(numbers)
    assert chart["axis"] == [pytest.approx(0.665), 2]
    assert chart["unit"] == "base = 1; cut off above 2"


def test_axes_of_constants_and_of_speeds_start_at_zero():
    assert axis_of("Learning rate", lr=[2.0, 2.0]) == [0, pytest.approx(2.3)]
    assert axis_of("Learning rate", lr=[0.0, 0.0]) == [0, 1]
    assert axis_of("Speed", images_per_second=[10.0, 12.0]) == [0, pytest.approx(13.8)]


def test_a_page_of_many_steps_takes_little_memory(tmp_path):
    """It is written during training, and rows kept as dicts took a kilobyte per step."""
    num_steps = 20_000
    names = ("train_loss", "lr", "grad_norm", "epoch", "images_per_second", "peak_memory_gib")
    row = dict.fromkeys(names, 1.23456)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps({"step": step} | row) + "\n" for step in range(1, num_steps + 1))
    report_page.write_page(tmp_path)  # imports
    tracemalloc.start()
    try:
        report_page.write_page(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 * num_steps + 8e6  # BokehJS and the page with it: 4 MB


@pytest.mark.parametrize("most", [3, 4, 10, 100])
def test_steps_that_are_shown_hold_the_best_the_first_and_the_last(most):
    steps = list(range(10, 610, 10))
    for best in (None, 10, 250, 255, 600):
        shown = report_page.choose_steps(steps, best, most)
        assert len(shown) <= most
        assert shown == sorted(set(shown) & set(steps))
        assert {10, 600} <= set(shown)
        assert best not in steps or best in shown


def test_a_half_written_line_is_no_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 0.5}\n{"step": 2, "train_l')
    numbers = runs.read_run(tmp_path).numbers
    assert (numbers.last_step, list(numbers.curves["train_loss"].values)) == (1, [0.5])
    report_page.write_page(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no run in it"):
        runs.read_run(tmp_path)
    with pytest.raises(InputError, match="there is no run in it"):
        report_page.find_runs([tmp_path])


def test_files_of_others_in_the_output_folder_are_not_the_runs(train, tmp_path):
    """In A1111's folder of LoRAs, for example, the files of the run are recognised by their names."""
    out = train(output_kohya_format=True)
    (out / "someone elses.safetensors").write_bytes(b"")
    (file,) = runs.read_run(out).files
    assert [path.name for path in file.paths] == ["pytorch_lora_weights.safetensors", "out.safetensors"]


def test_runs_with_equal_names_get_different_labels(tmp_path):
    """Labels use as much of the path as is needed, and a folder that is passed twice counts once."""
    folders = [tmp_path / machine / "rank" / "trial-0000" for machine in ("m1", "m2")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train_loss": 0.5}) + "\n")
    found = report_page.find_runs([*folders, tmp_path / "m1" / ".." / "m1" / "rank" / "trial-0000"])
    assert [folder.resolve() for folder in found] == folders
    text = report_page.write_comparison(found, tmp_path / "page.html", "runs").read_text(encoding="utf-8")
    for name in ("m1/rank/trial-0000", "m2/rank/trial-0000"):
        assert name in text


def test_findings_about_the_dataset_are_counted_without_a_plural():
    one = {"count": 1, "first": [["a.png", "b.png"]]}
    found = dict(report_page._findings({"notes": ["a note"], "equal": one, "alike": one | {"count": 2}}))
    assert found == {
        "Notes, such as pictures left out: 1": ["a note"],
        "Groups of identical files: 1": ["a.png = b.png"],
        "Groups of pictures that look alike: 2": ["a.png = b.png", "... and 1 more"],
    }


@pytest.fixture
def recorded(finished, tmp_path):
    """A copy of the folder of the finished run."""
    shutil.copytree(finished.out, tmp_path / "run")
    return tmp_path / "run"


def truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def with_broken_pixels(path):
    """The sizes of its parts and their checksums are right, but the pixels can't be unpacked."""
    with Image.open(path) as image:
        info, size = image.text, image.size
    chunks = PngInfo()
    for name, text in info.items():
        chunks.add_text(name, text)
    data = io.BytesIO()
    Image.new("RGB", size).save(data, "PNG", pnginfo=chunks)
    before = data.getvalue()
    start = before.index(b"IDAT")
    length = int.from_bytes(before[start - 4 : start], "big")
    broken = b"IDAT" + b"\xff" * length
    rest = before[start + 4 + length + 4 :]
    path.write_bytes(before[:start] + broken + zlib.crc32(broken).to_bytes(4, "big") + rest)


def folder_of_that_name(path):
    path.unlink()
    path.mkdir()


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("nowhere.png")


DAMAGES = [
    lambda path: path.write_bytes(b"no picture"),
    truncated,
    with_broken_pixels,
    folder_of_that_name,
    link_to_nothing,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=["text", "truncated", "pixels", "folder", "link"])
def test_a_damaged_sample_picture_is_left_out(recorded, damage, caplog):
    path = sorted(recorded.glob("validation/step-*/prompt-*.png"))[-1]
    damage(path)
    before = len(Reader(recorded / "report.html").images)
    assert report_page.update_page(recorded)
    assert len(Reader(recorded / "report.html").images) == before - 1
    assert report_page.update_page(recorded)  # the line is not repeated each time
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} is left out, because it can't be read as a picture")
    paths = len([*recorded.glob("validation/step-*/prompt-*.png")])
    bases = len([*recorded.glob("validation/step-000000/prompt-*.png")])
    assert len(dashboard.make_sample_rows(runs.read_run(recorded))) == paths - bases - 1


@pytest.mark.parametrize("damage", [*DAMAGES[:4]], ids=["text", "truncated", "pixels", "folder"])
def test_a_damaged_picture_of_the_base_model_stops_no_training(recorded, damage):
    """The trackers show it beside the LoRA's."""
    path = recorded / "validation" / "step-000000" / "prompt-00-0.png"
    info = runs.read_info(path)
    drawing = SimpleNamespace(stem=path.stem, prompt=info["prompt"], seed=int(info["seed"]))
    assert list(sample_pictures.base_images(recorded / "validation", [drawing])) == [0]
    damage(path)
    assert sample_pictures.base_images(recorded / "validation", [drawing]) == {}


@pytest.mark.parametrize("place", ["", "best", "epoch-0001"])
@pytest.mark.parametrize("data", [b"xx", b"", b"\xff" * 99])
def test_a_damaged_lora_is_left_out(recorded, place, data, caplog):
    path = recorded / place / "pytorch_lora_weights.safetensors"
    assert path.is_file()
    path.write_bytes(data)
    report_page.write_page(recorded)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} is left out, because it is damaged (")


def changed(*keys):
    """Returns a function that replaces the value at these keys of about.json."""

    def change(found, value):
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return change


PARTS = {
    ("command",): 5, ("settings",): [], ("versions",): "1", ("machine",): 5, ("dataset",): "<script>",
    **{("dataset", name): "<script>x" for name in ("pictures", "captions", "different_captions", "validated",
       "samples_an_epoch", "steps_an_epoch", "sizes", "concepts", "repeats", "notes", "shown", "enlarged", "equal", "alike")},
    ("dataset", "held_out"): ["a"], ("dataset", "shown", 0): "x", ("dataset", "shown", 0, "captions"): "x",
    ("dataset", "shown", 0, "captions", 0): None, ("dataset", "shown", 0, "preview"): 5,
    ("dataset", "shown", 0, "without_concept"): 5, ("dataset", "concepts", "x"): {"pictures": "3"},
    ("dataset", "equal"): {"count": 1, "first": [[5]]}, ("dataset", "enlarged"): {"count": "1", "first": []},
    ("dataset", "alike"): {"count": 1, "first": [{"a": 1}]}, ("dataset", "notes"): [5],
}  # fmt: skip


@pytest.mark.parametrize("keys", PARTS, ids=lambda keys: "-".join(map(str, keys)))
def test_a_part_of_another_type_is_refused_in_one_line(recorded, keys):
    path = recorded / "about.json"
    found = json.loads(path.read_text())
    changed(*keys)(found, PARTS[keys])
    path.write_text(json.dumps(found))
    for write in (lambda: report_page.write_page(recorded), lambda: runs.read_run(recorded)):
        with pytest.raises(InputError) as stop:
            write()
        assert str(stop.value).startswith(str(path))
        assert "\n" not in str(stop.value)
        assert "Restore the file" in str(stop.value)


@pytest.mark.parametrize("name", ["pictures", "shown", "sizes", "concepts", "fingerprint"])
def test_a_missing_part_of_the_data_sheet_is_named(recorded, name):
    path = recorded / "about.json"
    found = json.loads(path.read_text())
    del found["dataset"][name]
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match=f"'{name}' is missing"):
        report_page.write_page(recorded)


def test_flags_whose_names_are_no_text_are_shown(recorded, tmp_path):
    (recorded / "run.yaml").write_text("1: 2\nrank: 4\nnull: 3\n")
    shutil.copytree(recorded, tmp_path / "other")
    (tmp_path / "other" / "run.yaml").write_text("2: 2\nrank: 8\n")
    report_page.write_comparison([recorded, tmp_path / "other"], tmp_path / "both.html", "both")
