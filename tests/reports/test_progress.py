"""What a real run shows while one waits."""

import re

import pytest

from text_to_image_lora.reports import progress


@pytest.fixture
def shown(monkeypatch, capfd):
    """`shown()`: the titles of the progress bars so far, without those of the cache, each once in the order of appearance."""
    monkeypatch.setattr(progress, "SECONDS_WITHOUT_BAR", 0)

    def titles():
        found = re.findall(
            r"(drawing sample pictures|validating|training): ", capfd.readouterr().err.replace("\r", "\n")
        )
        return list(dict.fromkeys(found))

    return titles


PROMPTS = dict(validation_prompts=["a red axe"], validation_steps=1)


def test_the_bar_of_the_steps_begins_when_the_steps_begin(train, shown):
    """The base model's sample pictures and validations come before it, and have bars of their own."""
    train(validation_split=0.3, **PROMPTS)
    assert shown() == ["validating", "drawing sample pictures", "training"]


def test_sample_pictures_alone_have_a_bar(train, shown):
    train(**PROMPTS)
    assert shown() == ["drawing sample pictures", "training"]


def test_a_run_that_is_resumed_says_that_its_time_is_not_the_whole(train, capsys):
    train(max_train_steps=1)
    assert re.search(r"README.md, \d+ s\)", capsys.readouterr().out)
    train(max_train_steps=2)
    assert re.search(r"README.md, \d+ s since the run was resumed\)", capsys.readouterr().out)
