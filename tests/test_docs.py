"""The documentation is correct: the page of the flags, the recipes, and the commands in README and docs."""

import re
import shlex

import pytest
import yaml
from conftest import ROOT, train_script

import infer
from scripts import make_docs


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "metadata").glob("*.md"))]
LINKED = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *ROOT.glob("cloud/*.md"),
]
LINKED += sorted(ROOT.glob("models/*/README.md"))
# Flags on the pages that are not flags of our commands: of launchers, of other programs, and behind prompts.
OF_OTHERS = set(
    """
    --config_file --multi_gpu --num_processes --machine_rank --num_machines --main_process_ip --main_process_port
    --nproc_per_node --standalone --master_port --repo-type --local-dir --no-half-vae --detach --timeout --secrets
    --signal --requeue --flavor --negative --guidance --steps --help --no
    """.split()  # noqa: SIM905 (one name a word reads better than one a line)
)


def test_the_page_of_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == make_docs.flags_page(), "run: make docs"


def test_each_help_is_understood_alone():
    """Each line of help must be clear by itself, for example in the output of grep."""
    leaning = re.compile(r"\b(the same|as above|likewise|of it|its width|these two)\b|^of ")
    for action in train_script.build_parser()._actions:
        assert action.help, action.dest
        assert not leaning.search(action.help), f"--{action.dest}: {action.help}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_for_and_is_taken(recipe):
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(r"# \w.{20,}", first), first
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    pictures = [] if {"train_data_dir", "dataset_name"} & given.keys() else ["--train_data_dir", "pictures"]
    settings = train_script.parse_settings(["--config", str(recipe), *pictures])
    assert settings.batches.max_train_steps == given["max_train_steps"]


def test_there_are_recipes():
    assert {"demo", "pokemon", "few_pictures", "colab_t4"} <= {path.stem for path in RECIPES}


def text_of(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def commands_in(page, script="train_text_to_image_lora.py"):
    """Returns the words after the script's name in each command that a page shows."""
    blocks = re.findall(r"```bash\n(.*?)```", text_of(page), flags=re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if script in line and "--help" not in line:
            yield shlex.split(line.partition(script)[2], comments=True)


COMMANDS = [(name_of(page), words) for page in PAGES for words in commands_in(page)]


def test_the_readme_shows_commands():
    assert sum(name == "README.md" for name, _ in COMMANDS) >= 2


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_commands_of_the_pages_are_taken(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in words if word != "..."]
    if not {"--pretrained_model_name_or_path", "--config"} & set(words):
        words += ["--pretrained_model_name_or_path", "model"]
    if not {"--train_data_dir", "--dataset_name", "--config"} & set(words):
        words += ["--train_data_dir", "pictures"]
    train_script.parse_settings(words)


def flags_of(script):
    """Returns the flags of infer.py or of a file in scripts/, from its parser or its source."""
    if script == "infer.py":
        return {*infer.build_parser()._option_string_actions}
    text = text_of(ROOT / script)
    if "add_machine_flags(" in text:  # which are defined in a file that several commands share
        text += text_of(ROOT / "scripts" / "annotating" / "command.py")
    return {*re.findall(r"\"(--\w+)\"", text)} | {"--lora_scale", "--help"}


def as_typed(script):
    """Returns how a page calls a script: files of scripts/mini_sd/ are run as modules."""
    return script.removesuffix(".py").replace("/", ".") if script.startswith("scripts/mini_sd/") else script


SCRIPTS = ["infer.py", *sorted(name_of(path) for path in (ROOT / "scripts").rglob("*.py"))]
OTHER_COMMANDS = [
    (name_of(page), script, words)
    for page in LINKED
    for script in SCRIPTS
    for words in commands_in(page, as_typed(script))
]


@pytest.mark.parametrize(("page", "script", "words"), OTHER_COMMANDS, ids=lambda value: value[:40] if value else "")
def test_the_other_commands_of_the_pages_have_such_flags(page, script, words):
    given = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
    assert given <= flags_of(script)
    if script == "scripts/sweep.py":  # behind --sweep and --flags stand flags of the training command
        named = {f"--{word.partition('=')[0]}" for word in words if re.match(r"[a-z_]+=", word)}
        assert named <= {*train_script.build_parser()._option_string_actions}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_that_a_page_names_is_there(page):
    """Also in running text: `--flag`, alone or with its value."""
    named = {
        flag
        for code in re.findall(r"`([^`]+)`", text_of(page))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\w", code)
    }
    known = {*train_script.build_parser()._option_string_actions} | OF_OTHERS
    assert named - known.union(*map(flags_of, SCRIPTS)) == set()


def links_of(page):
    """Returns (target, heading) of each link to a file of the project."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text_of(page))
    found += [(target, "") for target in re.findall(r'<img src="([^"]*)"', text_of(page))]
    return [(page.parent / target if target else page, heading) for target, heading in found if "://" not in target]


def headings_of(page):
    """Returns the anchors of a page's headings: lower case, without punctuation, with dashes for spaces."""
    lines = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL).splitlines()
    titles = [re.sub(r"^#+ ", "", line).lower() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    for target, heading in links_of(page):
        assert target.exists(), target
        if heading:
            assert heading in headings_of(target), f"{target}#{heading}"


def test_everything_is_found_from_the_readme():
    """Every page, recipe, file of cloud/ and script is linked or named on a page that can be reached by links."""
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        page = page / "README.md" if page.is_dir() else page
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            waiting += [target for target, _ in links_of(page)]
    targets = {target.resolve() for page in reached for target, _ in links_of(page)}
    assert {name_of(page) for page in LINKED} - {name_of(page) for page in reached} == set()
    others = [*RECIPES, *(ROOT / "cloud").iterdir(), *(ROOT / "docs").glob("*.png")]
    assert [name_of(path) for path in others if path not in targets and path.name != "Dockerfile.dockerignore"] == []
    scripts = ROOT / "scripts"
    files = [path for path in scripts.rglob("*.*") if path.suffix in (".py", ".yaml") and path.name != "__init__.py"]
    table = text_of(ROOT / "CONTRIBUTING.md").partition("| script | for |")[2].partition("\n\n")[0]
    assert [name_of(path) for path in files if path.relative_to(scripts).as_posix() not in table] == []


def test_each_recipes_page_has_its_command():
    table = text_of(ROOT / "docs" / "recipes" / "README.md")
    for path in sorted((ROOT / "docs" / "recipes").glob("*.md")):
        if path.name != "README.md":
            assert f"({path.name})" in table
            assert any(f"recipes/{path.stem}.yaml" in words for words in commands_in(path)), path.name
