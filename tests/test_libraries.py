"""What the libraries load and print while they are imported, and how many threads they use."""

import subprocess
import sys

import pytest
from conftest import CORES, ROOT, THREADS

from text_to_image_lora.libraries import hide_modules, num_cpu_threads


def test_a_hidden_module_is_found_again(tmp_path, monkeypatch):
    (tmp_path / "rarely_needed.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with hide_modules("rarely_needed", "sys"), pytest.raises(ImportError):
        import rarely_needed
    import rarely_needed

    assert rarely_needed.value == 3
    assert sys.modules["sys"] is sys
    with hide_modules("rarely_needed"):  # modules that are already imported stay visible
        import rarely_needed  # noqa: F401
    del sys.modules["rarely_needed"]


def test_a_run_imports_neither_bitsandbytes_nor_xformers_nor_bokeh(tiny_sd, pictures, tmp_path):
    code = (
        "import sys, train_text_to_image_lora as script; script.main(script.parse_settings(sys.argv[1:]))\n"
        "assert not {'bitsandbytes', 'xformers', 'bokeh'} & sys.modules.keys()"
    )
    flags = {
        "pretrained_model_name_or_path": tiny_sd, "train_data_dir": pictures, "resolution": 32, "max_train_steps": 1,
        "output_dir": tmp_path / "out", "latent_cache_dir": tmp_path / "cache", "report_to": "none",
    }  # fmt: skip
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["--help", "--dry_run"])
def test_what_trains_nothing_imports_nothing_of_the_page(tiny_sd, pictures, tmp_path, flag):
    code = (
        "import contextlib, sys, train_text_to_image_lora as script\n"
        "with contextlib.suppress(SystemExit): script.main(script.parse_settings(sys.argv[1:]))\n"
        "assert not {'bokeh', 'text_to_image_lora.reports.report_page'} & sys.modules.keys()"
    )
    words = [
        "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", pictures, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "--resolution", "32", flag],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("wanted", "environment", "threads"), THREADS)
def test_how_many_threads(cores, wanted, environment, threads):
    assert num_cpu_threads(wanted, environment) == threads


def test_cores_that_it_may_not_use_are_not_counted(cores, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert num_cpu_threads(None, {}) == 2
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: None)  # as on a machine where the number is unknown
    assert num_cpu_threads(None, {}) == 2
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS and Windows
    assert num_cpu_threads(None, {}) == 2 * CORES
