"""The log of the commands: its stream, its format, its processes, and complete lines beside a progress bar."""

import logging
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, read_terminal
from tqdm import tqdm

from text_to_image_lora import log


logger = logging.getLogger("text_to_image_lora.reports.anything")
TEXT = "日本 é \u202e \x1b[2J \x9b2J"  # two orders to clear the screen, and one that turns the direction of writing


def test_levels_have_their_streams_and_formats(capsys):
    log.start(warning_format="note: %(message)s")
    logger.debug("not for users")
    logger.info("%d of %d pictures", 2, 3)
    logger.warning("one is small")
    assert capsys.readouterr() == ("2 of 3 pictures\n", "note: one is small\n")


def test_a_second_start_replaces_the_first_and_nothing_else(capsys):
    other = logging.NullHandler()
    log.PACKAGE.addHandler(other)
    log.start(warning_format="note: %(message)s")
    log.start()
    logger.warning("once")
    assert capsys.readouterr() == ("", "once\n")
    assert other in log.PACKAGE.handlers
    log.PACKAGE.removeHandler(other)


def test_only_the_main_process_writes(capsys):
    log.start(main_process=False)
    logger.info("a line")
    logger.error("an error")
    assert capsys.readouterr() == ("", "")


def test_a_line_does_not_tear_a_progress_bar(capsys):
    log.start()
    with tqdm(total=2, file=sys.stderr, ncols=60) as bar:
        bar.update()
        logger.warning("careful")
        logger.info("a picture")
    said, shown = capsys.readouterr()
    assert said == "a picture\n"
    # tqdm overwrites the bar with spaces before the line, and draws it again below the line.
    assert re.search(r"\r +\rcareful\n\r +50%\|", shown.replace("\x1b[A", "")), repr(shown)


def test_it_needs_nothing_that_is_not_there():
    """A library that uses the root logger duplicates no line; nothing fails without tqdm, or before `start`."""
    code = (
        "import logging, sys\nfrom text_to_image_lora import log\n"
        "logging.basicConfig(stream=sys.stdout, format='root: %(message)s')\n"
        "log.start()\nlogging.getLogger('text_to_image_lora.files').info('once')\nassert 'tqdm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("once\n", "")


def test_a_name_with_bytes_that_are_not_utf8_is_printed():
    """The record is not logged, because reports of other tools about this test could not hold it."""
    record = logging.makeLogRecord({"msg": "caf\udce9.png: it is not a picture", "levelno": logging.INFO})
    assert log.LineHandler("%(message)s").format(record) == "caf\\udce9.png: it is not a picture"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
@pytest.mark.parametrize("columns", [None, "50"])
def test_a_terminal_of_unknown_size_shows_progress_bars(columns):
    """As a container's terminal may be; tqdm alone would write empty lines."""
    code = (
        "from text_to_image_lora import log\nlog.start()\nfrom tqdm import tqdm\n"
        "with tqdm(total=2, desc='training') as bar: bar.update(2)"
    )
    ours, theirs = os.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COLUMNS", "TQDM_"))}
    environment |= {} if columns is None else {"COLUMNS": columns}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=theirs, env=environment, check=True)
    os.close(theirs)
    bar = read_terminal(ours).replace("\r\n", "").split("\r")[-1]
    assert bar.startswith("training: 100%|")
    assert len(bar) == int(columns or 80)


# A terminal that is gone, or that lacks letters.


LINES = """
import logging, sys
from text_to_image_lora import log
log.start()
logging.getLogger("text_to_image_lora.x").info("a line " * 2000)
logging.getLogger("text_to_image_lora.x").warning("a warning")
print("printed " * 2000)
print("bar", file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("stderr", ["shared", "own"])
@pytest.mark.parametrize("where", ["pipe", "/dev/full", "closed"])
def test_what_can_not_be_told_stops_nothing(tmp_path, where, stderr):
    if where == "/dev/full" and not os.path.exists(where):
        pytest.skip("this system has no /dev/full")
    reading, writing = os.pipe()
    if where == "/dev/full":
        os.close(writing)
        writing = os.open(where, os.O_WRONLY)
    os.close(reading)  # nobody reads the pipe
    command = [sys.executable, "-c", LINES, tmp_path / "done.txt"]
    if where == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(
        command, cwd=ROOT, stdout=writing, stderr=writing if stderr == "shared" else subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 0
    assert (tmp_path / "done.txt").read_text() == "done"
    if stderr == "own":
        assert done.stderr == "a warning\nbar\n"


@pytest.mark.parametrize("script", ["train_text_to_image_lora.py", "infer.py"])
def test_help_can_be_cut_off(script):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"\u65e5\u672c \xe9 \u202e \x1b[2J \x9b2J"), ("cp1252", r"\u65e5\u672c é \u202e \x1b[2J \x9b2J"),
     ("utf-8", r"日本 é \u202e \x1b[2J \x9b2J")],
)  # fmt: skip
def test_letters_that_a_terminal_lacks_and_orders_to_it_are_escaped(encoding, shown):
    code = (
        "import logging\nfrom text_to_image_lora import log\nfrom text_to_image_lora.errors import InputError\nlog.start()\n"
        f"text = {ascii(TEXT)}\nlogging.getLogger('text_to_image_lora.x').info(text)\nprint(text)\n"
        "import sys\nprint(InputError(text), file=sys.stderr)"
    )
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=env)
    assert done.stdout.decode(encoding).splitlines() == [shown, shown]
    assert done.stderr.decode(encoding).splitlines() == [shown]


def test_a_progress_bar_may_still_move_the_cursor():
    code = "import sys\nfrom text_to_image_lora import log\nlog.start()\nsys.stderr.write('\\x1b[A\\r50%')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stderr == b"\x1b[A\r50%"
