"""What is written for people is true: the flags' page, the recipes, and the commands that the README shows."""

import re
import shlex

import make_docs
import pytest
import yaml
from conftest import ROOT, train_script


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "metadata").glob("*.md"))]


def test_the_page_of_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == make_docs.flags_page(), "run: make docs"


def test_each_help_is_understood_alone():
    """As grep shows it: no line leans on its neighbour."""
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
    args = train_script.parse_args(["--config", str(recipe), *pictures])
    assert args.max_train_steps == given["max_train_steps"]


def test_there_are_recipes():
    assert {"demo", "pokemon", "few_pictures", "colab_t4"} <= {path.stem for path in RECIPES}


def commands_in(page):
    """The words after the training script in each command that a page shows."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if "train_text_to_image_lora.py" in line and "--help" not in line:
            yield shlex.split(line.partition("train_text_to_image_lora.py")[2], comments=True)


COMMANDS = [(page.name, words) for page in PAGES for words in commands_in(page)]


def test_the_readme_shows_commands():
    assert sum(name == "README.md" for name, _ in COMMANDS) >= 3


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_commands_of_the_pages_are_taken(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in words if word != "..."]
    if not {"--pretrained_model_name_or_path", "--config"} & set(words):
        words += ["--pretrained_model_name_or_path", "model"]
    if not {"--train_data_dir", "--dataset_name", "--config"} & set(words):
        words += ["--train_data_dir", "pictures"]
    train_script.parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
