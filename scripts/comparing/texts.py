"""Text that commands print and write, without what differs in each run: paths, times, and progress bars."""

import html
import re
import shlex


class Lines(tuple):
    """Lines of text, in which --words accepts differences."""


BAR = re.compile(r"(.*?): +\d+%\|[^|]*\| *([\d.]+\w?/[\d.]+\w?) \[")
CHANGING = {  # {pattern: its replacement}
    r"\x1b\[[0-9;]*[A-Za-z]": "",  # colours
    r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?(\+\d\d:\d\d)?)?": "DATE",
    # Times and speeds, the peak memory of a process, and the free space of a disk.
    r"\b[\d.]+(e[+-]\d+)? (h \d+ min|h|min|s)\b(?!/)": "TIME",
    r"\b[\d.]+(e[+-]\d+)? (images/s|it/s|s/it)": "SPEED",
    r"at most [\d.]+ [KMGT]iB of memory so far": "at most SOME of memory so far",
    r"\b[\d.]+ [KMGT]iB (are|is) free": r"SOME \1 free",
    # A note about steps that other programs slowed down.
    r"(?m)^since step \d+ a step takes .*\n": "",
    r"offline-run-\d+_\d+-\w+": "offline-run-NAME",  # W&B's folder
    # The prefix of log lines of torchrun.
    r"(?m)^[WEI]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ ": "",
}


class Names:
    """Replaces the folder of results and the checkout in paths by names that are equal on both sides."""

    def __init__(self, folder, checkout):
        # The path of the folder may be relative to the home folder or to the working directory.
        self.patterns = {
            re.compile(rf"(?:[\w.-]*/|~/)*{re.escape(folder.name)}"): "$item",
            re.compile(rf"{re.escape(str(checkout))}(?![\w-])"): "$checkout",
        }

    def __call__(self, text):
        for pattern, name in self.patterns.items():
            text = pattern.sub(name, text)
        return text


def without_times(text):
    """Returns the text without times, speeds and memory."""
    for pattern, name in CHANGING.items():
        text = re.sub(pattern, name, text)
    return text


def output(text, names):
    """Returns the output of a command as `Lines`; a progress bar is reduced to its title and its last count."""
    lines, text = [], without_times(names(text))
    for line in filter(None, (line.rstrip() for line in re.split(r"[\r\n]+", text))):
        if bar := BAR.match(line):
            title = f"[progress] {bar[1]}"
            if lines and lines[-1].rpartition(" ")[0] == title:
                lines.pop()
            line = f"{title} {bar[2]}"
        lines.append(in_order(line))
    return Lines(lines)


def in_order(line):
    """Returns the line. A list of the settings in which two runs differ is sorted, because the order of --help may change."""
    start, found, rest = line.partition("belongs to another run (")
    settings, _, end = rest.partition(")")
    return f"{start}{found}{'; '.join(sorted(settings.split('; ')))}){end}" if found else line


def sorted_command(command):
    """Returns a command line with its flags sorted, because the order of --help may change."""
    groups = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return " ".join(sorted(shlex.join(group) for group in groups))


def model_card(text):
    """Returns a README.md as `Lines`, with the rows of its tables sorted, because the order of --help may change."""
    rows = sorted(line for line in text.splitlines() if line.startswith("| "))
    return Lines([line for line in text.splitlines() if not line.startswith("| ")] + rows)


def page(text):
    """Returns the visible text of an HTML page as sorted `Lines`."""
    text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>|<!--.*?-->", "", text)
    nodes = (" ".join(html.unescape(node).split()) for node in re.split(r"<[^>]*>", without_times(text)))
    commands = ("accelerate launch", "ACCELERATE_USE_CPU")
    return Lines(sorted(sorted_command(node) if node.startswith(commands) else node for node in nodes if node))


def help_entries(text):
    """Returns {"flag --NAME", "help of --NAME", "description" or "usage": ...} of the output of --help.

    The result depends neither on groups nor on the order of flags nor on line breaks.
    """
    usage, *paragraphs = re.split(r"\n\s*\n", text.strip())
    parts = re.findall(r"\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]|[^\s\[\]]+", " ".join(usage.split()))
    found, described = {}, []
    for paragraph in paragraphs:
        blocks = re.split(r"\n(?=  -)", f"\n{paragraph}")
        # Text before the flags of a group is its title or its description; other paragraphs describe the command.
        if not re.match(r"\n(\S.*:$|  )", blocks[0], re.MULTILINE):
            described.append(joined(blocks[0]))
        for block in blocks[1:]:
            call, _, described_as = re.sub(r"\s{2,}", "\n", block.strip()).partition("\n")
            name = next(word for word in re.split(r"[ ,]+", call) if word.startswith("--"))
            found |= {f"flag {name}": joined(call), f"help of {name}": Lines([joined(described_as)])}
    return found | {"description": Lines(described), "usage": sorted(parts)}


def joined(text):
    """Returns wrapped text in one line; argparse also wraps after hyphens."""
    return re.sub(r"(?<=\w)-\s+(?=\w)", "-", " ".join(text.split()))
