"""Preservation: which samples, under which captions, towards what target; and whole runs with it."""

import numpy as np
import pytest
import torch
from conftest import TORCHRUN, make_picture_set, read_lora, read_metrics, run_command, train_script, write_pictures

from text_to_image_lora.errors import InputError
from text_to_image_lora.models.loading import find_base_model
from text_to_image_lora.pictures.captions import ConceptRemover, check_concept_remover, leave_out_phrase
from text_to_image_lora.pictures.settings import CaptionSettings
from text_to_image_lora.training.batches import Division, EffectiveBatchSampler, Epoch, Sample
from text_to_image_lora.training.data import Draws, TrainingSet
from text_to_image_lora.training.objective_settings import PreservationSettings


@pytest.mark.parametrize(
    ("caption", "phrase", "without"),
    [
        ("a blue axe with pink blossoms on a gray background", "with pink blossoms", "a blue axe on a gray background"),
        ("a blue axe With  Pink\tblossoms", "with pink blossoms", "a blue axe"),
        ("sks, a red axe", "sks", "a red axe"),
        ("a photo of SKS dog", "sks", "a photo of dog"),
        ("old, sks , red", "sks", "old, red"),
        ("a sks-style axe, skss", "sks", "a -style axe, skss"),  # whole words only
        ("a red axe", "sks", "a red axe"),
        ("a  red axe,  old", "sks", "a  red axe,  old"),  # unchanged
        ("sks", "sks", ""),
        ("c++ code, c++", "c++", "code"),
        ("un chat 绿, 绿", "绿", "un chat"),
    ],
)  # fmt: skip
def test_a_phrase_is_left_out_with_its_comma_and_spaces(caption, phrase, without):
    assert leave_out_phrase(caption, phrase) == without


@pytest.mark.parametrize(
    ("remover", "without"),
    [
        (ConceptRemover(("sks", "old")), ["a red axe", "a spear", ""]),
        (ConceptRemover(("sks",), otherwise="a weapon"), ["a red axe, old", "a spear", "a weapon"]),
        (ConceptRemover(("sks",), prompt="a weapon"), ["a weapon"] * 3),
        (ConceptRemover(("sks",), prompt="photo, {caption}", otherwise="x"), ["photo, a red axe, old", "photo, a spear", "photo, a bow"]),
        (ConceptRemover((), prompt=""), [""] * 3),
        (ConceptRemover((), otherwise="a weapon"), ["a weapon"] * 3),
    ],
)  # fmt: skip
def test_the_caption_without_the_concept(remover, without):
    assert [remover(caption) for caption in ("sks, a red axe, old", "a spear sks", "a bow")] == without


@pytest.mark.parametrize(
    "remover", [ConceptRemover(("skss",)), ConceptRemover(()), ConceptRemover(("skss", "old"), otherwise="a weapon")]
)
def test_captions_that_do_not_name_the_concept_are_refused(remover):
    with pytest.raises(InputError, match="--preservation: no caption .*'sks, a red axe'.*--preservation_prompt TEXT"):
        check_concept_remover(remover, ["sks, a red axe", "sks, a bow"])


def test_what_captions_become_is_logged(said):
    check_concept_remover(ConceptRemover(("sks",), otherwise="a weapon"), ["sks, a red axe", "a bow", "sks"] * 2)
    assert said == [
        "preservation: 1 of 3 different captions contain no phrase of the concept; their samples are also trained as 'a weapon'",
        "preservation: 'sks, a red axe' is also trained as 'a red axe', with the base model's prediction",
        "preservation: 'a bow' is also trained as 'a weapon', with the base model's prediction",
        "preservation: 'sks' is also trained as '', with the base model's prediction",
    ]


def micro_batches(division, share, weight=1.0, num_steps=30):
    preservation = PreservationSettings("output", preservation_share=share, preservation_weight=weight)
    sampler = EffectiveBatchSampler(Epoch(np.arange(11), seed=3), division, preservation)
    sampler.num_steps = num_steps
    return list(sampler)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_which_samples_are_preserved_does_not_depend_on_the_division(share):
    """An epoch of 11 samples in steps of 4, whose last has 3, on 1, 2 and 4 processes, at once or one after the other."""

    def preserved(*divisions):
        rows = [row for division in divisions for batch in micro_batches(division, share) for row in batch]
        return sorted(row[:3] for row in rows if row.preserves)

    whole = preserved(Division(4))
    assert (
        whole
        == preserved(Division(1, 4))
        == preserved(Division(2, 2))
        == preserved(Division(2, 1, 0, 2), Division(2, 1, 1, 2))
    )
    assert whole == preserved(*(Division(1, 1, rank, 4) for rank in range(4)))
    assert len(whole) / (30 * 11 / 3) == pytest.approx(share, abs=0.03)
    assert len(set(whole)) == len(whole)


def test_preserved_samples_follow_their_batch_and_have_their_weight():
    """On average over the steps, the preservation loss has the given weight, whatever the share."""
    for share in (0.25, 1.0):
        batches = micro_batches(Division(4), share, weight=2.0, num_steps=300)
        own = [row.weight for batch in batches for row in batch if not row.preserves]
        again = [row.weight for batch in batches for row in batch if row.preserves]
        assert sum(again) / sum(own) == pytest.approx(2.0, rel=0.03)
        for batch in batches:
            flags = [row.preserves for row in batch]
            assert flags == sorted(flags)
            assert {row[:3] for row in batch if row.preserves} <= {row[:3] for row in batch if not row.preserves}
            assert flags.count(True) <= PreservationSettings("output", preservation_share=share).most(
                flags.count(False)
            )


def test_without_the_flag_nothing_is_preserved():
    sampler = EffectiveBatchSampler(Epoch(np.arange(11)), Division(4))
    sampler.num_steps = 6
    assert not [row for batch in sampler for row in batch if row.preserves]
    assert PreservationSettings().most(100) == 0


def test_a_preserved_sample_has_the_draws_of_its_sample_and_no_mask(tiny_sd, tmp_path):
    folder = write_pictures(tmp_path / "set", count=1, captions=["sks, red, old"])
    (folder / "0.mask.png").write_bytes((folder / "0.png").read_bytes())
    pictures = make_picture_set(folder, random_flip=True)
    rules = CaptionSettings(shuffle_tags=True, caption_dropout=0.9)
    training_set = TrainingSet(
        pictures, find_base_model(str(tiny_sd)), Draws(0, 1000, rules), remove_concept=ConceptRemover(("sks",))
    )
    for step in range(8):
        own, again = (training_set[Sample(0, step, 0, 1.0, preserves)] for preserves in (False, True))
        for name in ("timesteps", "noise", "channel_noise", "posterior_noise", "pixels"):
            assert torch.equal(own[name], again[name]), name
        assert (bool(own["preserves"]), bool(again["preserves"])) == (False, True)
        assert again["captions"] in ("red, old", "old, red")
        if own["captions"]:  # otherwise it is dropped, which the preserved sample never is
            assert again["captions"] == leave_out_phrase(own["captions"], "sks")
        assert (own["mask"] < 1).any()
        assert (again["mask"] == 1).all()


CAPTIONS = ["sks axe, red", "sks axe, blue, old", "sks axe, green"]
COMMON = dict(
    preservation="output", concept_phrases=["sks"], max_train_steps=4, checkpointing_steps=2, learning_rate=1e-2,
    preservation_share=0.5, num_validation_images=0, center_crop=True, random_flip=True,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "captioned", count=5, captions=CAPTIONS)


def losses(folder):
    return [row["train_loss"] for row in read_metrics(folder)]


def difference(first, second):
    a, b = read_lora(first), read_lora(second)
    assert a.keys() == b.keys()
    return (
        torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
        / torch.cat([a[name].flatten() for name in a]).norm()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(train_text_encoder=True, caption_dropout=0.3),
        dict(use_ema=True, snr_gamma=5.0, perceptual_loss="self", perceptual_loss_weight=1.0, noise_offset=0.1),
        dict(perceptual_loss="decoder", perceptual_max_timestep=900, preservation_prompt="photo, {caption}"),
    ],
)  # fmt: skip
def test_runs_with_it(train, tmp_path, folder, options):
    """Preservation changes the run, but not its first loss, as a new LoRA is the base model; it can be cut and resumed."""
    options = COMMON | dict(train_data_dir=folder) | options
    plain = {name: value for name, value in options.items() if "preserv" not in name and "concept" not in name}
    without = train(output_dir=tmp_path / "plain", train_batch_size=4, **plain)
    whole = train(output_dir=tmp_path / "whole", train_batch_size=4, **options)
    assert losses(whole)[0] == pytest.approx(losses(without)[0], rel=1e-4)
    assert difference(without, whole) > 3e-3
    parts = train(output_dir=tmp_path / "parts", train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)
    assert difference(whole, parts) < 1e-3
    live = train(
        output_dir=tmp_path / "live", train_batch_size=4, cache_variations=0, **options | dict(random_flip=False)
    )
    cached = train(output_dir=tmp_path / "cached", train_batch_size=4, **options | dict(random_flip=False))
    assert losses(live) == pytest.approx(losses(cached), rel=1e-3)
    before = read_lora(whole)
    for file in (whole / "checkpoint-4").iterdir():
        file.unlink()
    resumed = read_lora(train(output_dir=whole, train_batch_size=4, **options))
    assert all(torch.equal(before[name], resumed[name]) for name in before)


def test_preservation_holds_the_lora_back_where_the_concept_is_not_named(train, tmp_path, folder, tiny_sd):
    """After many steps, the LoRA's prediction without the phrase is nearer to the base model's than without the flag."""
    from text_to_image_lora.models import lora, lora_file
    from text_to_image_lora.models.loading import load_components
    from text_to_image_lora.models.prompts import encode_prompts
    from text_to_image_lora.models.settings import LoraSettings

    options = COMMON | dict(train_data_dir=folder, max_train_steps=60, checkpointing_steps=0, train_batch_size=4)
    runs = {
        "kept": train(output_dir=tmp_path / "kept", **options | dict(preservation_share=1.0, preservation_weight=4.0)),
        "plain": train(output_dir=tmp_path / "plain", **options | dict(preservation="none", concept_phrases=None)),
    }
    loaded = load_components(find_base_model(str(tiny_sd)), torch.float32)
    noise, timesteps = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) * 120
    texts = [text for caption in CAPTIONS for text in (caption, leave_out_phrase(caption, "sks"))]
    drift = {}
    unet = loaded.denoiser
    lora.add_lora(
        unet, LoraSettings(rank=4, target_modules=("to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"))
    )

    @torch.no_grad()
    def predictions(text):
        states = encode_prompts(loaded.tokenizers[0], loaded.text_encoders[0], [text] * 8)
        return unet(noise, timesteps, states).sample

    with lora.without_adapters(unet):
        base = {text: predictions(text) for text in texts}
    for name, out in runs.items():
        lora.start_from(unet, lora_file.load_lora(out)[0]["unet"])
        drift[name] = [float((predictions(text) - base[text]).square().mean()) for text in texts]
    named, unnamed = slice(0, None, 2), slice(1, None, 2)
    assert np.mean(drift["kept"][unnamed]) < 0.5 * np.mean(drift["plain"][unnamed])
    assert np.mean(drift["kept"][named]) > np.mean(drift["kept"][unnamed])


def test_two_processes_equal_one(train, arguments, tmp_path, folder):
    options = COMMON | dict(train_data_dir=folder)
    one = train(output_dir=tmp_path / "one", train_batch_size=4, **options)
    words = arguments(output_dir=tmp_path / "two", train_batch_size=2, **options)
    done = run_command(words, TORCHRUN, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)
    assert difference(one, tmp_path / "two") < 1e-3


@pytest.mark.parametrize(
    "options", [dict(debug_loss=True), dict(use_dora=True, lora_dropout=0.2), dict(mixed_precision="bf16")]
)
def test_it_combines_with(train, folder, options):
    out = train(train_data_dir=folder, train_batch_size=4, **COMMON | options)
    rows = read_metrics(out)
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    if "debug_loss" in options:
        names = {name for row in rows for name in row if name.startswith("loss_for_")}
        assert names > {f"loss_for_{i}.png" for i in range(5)}
        assert any(name.startswith("loss_for_preserved_") for name in names)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--concept_phrases", "sks"], "--concept_phrases is only used for --preservation, for --num_class_images without --class_prompt, and to measure the drift"),
        (["--preservation_prompt", ""], "--preservation_prompt is only used for --preservation, and to measure the drift"),
        (["--preservation", "output", "--concept_phrases", " "], "--concept_phrases contains an empty text"),
        (["--preservation", "output", "--preservation_share", "0"], "--preservation_share 0: it must be more than 0 and at most 1."),
        (["--preservation", "output", "--preservation_weight", "0"], "--preservation_weight 0: it must be more than 0 and finite."),
        (["--preservation", "outputs"], "outputs"),
    ],
)  # fmt: skip
def test_wrong_flags(flags, reason):
    with pytest.raises(InputError) as raised:
        train_script.parse_settings(["--pretrained_model_name_or_path", "x", "--train_data_dir", "y", *flags])
    assert reason in str(raised.value)


def test_the_triggers_of_folders_name_the_concept(tmp_path):
    """Several folders have several triggers; a metadata file in a folder of such a name has captions of its own."""
    from conftest import read_records

    from text_to_image_lora.pictures.layouts import triggers_of

    for name in ("[sks]_[red dog]", "[ohwx]_[cat]"):
        write_pictures(tmp_path / "set" / name, count=2)
        (tmp_path / "set" / name / "metadata.jsonl").unlink()
    records = read_records(tmp_path / "set", caption_prefix="photo, ")
    assert sorted(triggers_of(records, CaptionSettings(caption_prefix="photo, "))) == ["ohwx", "sks"]
    other = read_records(write_pictures(tmp_path / "other" / "[axe]_[thing]", count=2, captions=["an axe, red"]))
    assert triggers_of(other, CaptionSettings()) == ()


def test_a_run_on_folders_with_triggers(train, tmp_path, capsys):
    folder = write_pictures(tmp_path / "set" / "[sks]_[dog]", count=3)
    (folder / "metadata.jsonl").unlink()
    train(train_data_dir=tmp_path / "set", preservation="output")
    assert (
        "preservation: 'sks dog' is also trained as 'dog', with the base model's prediction" in capsys.readouterr().out
    )
