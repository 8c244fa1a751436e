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
