"""--latent_cache_limit: what was least recently used is deleted, but nothing that the run needs."""

import os
import re

from conftest import read_metrics, write_pictures

from text_to_image_lora.training import shards


def shards_in(folder):
    return {path for kind in ("latents", "prompts") for path in (folder / kind).glob("*.safetensors")}


def make_older(folder, seconds):
    for path in [*shards_in(folder), *(folder / "class_pictures").glob("*")]:
        os.utime(path, (path.stat().st_atime - seconds, path.stat().st_mtime - seconds))


def test_beyond_the_limit_the_least_recently_used_files_are_deleted_but_none_that_the_run_needs(train, tmp_path, said):
    """Of three runs with different pictures, with validation pictures and class pictures, under a limit below one run's need."""
    flags = dict(
        latent_cache_dir=tmp_path / "cache", trigger_word="sks", num_class_images=2,
        validation_split=0.34, validation_steps=1, resume_from_checkpoint="none",
    )  # fmt: skip
    whole, folders = [], []
    for seed in (1, 2, 3):
        before = shards_in(tmp_path / "cache")
        pictures = write_pictures(tmp_path / f"set {seed}", seed=seed)
        limit = None if seed < 3 else 1e-6
        train(**flags, train_data_dir=pictures, class_inference_steps=seed, latent_cache_limit=limit)
        whole.append(shards_in(tmp_path / "cache") - before)
        folders = sorted((tmp_path / "cache" / "class_pictures").iterdir(), key=lambda path: path.stat().st_mtime)
        make_older(tmp_path / "cache", 100)
    assert all(whole)
    assert shards_in(tmp_path / "cache") >= whole[2]
    assert not shards_in(tmp_path / "cache") & (whole[0] - whole[1] - whole[2])
    assert len(folders) == 1
    assert len([*folders[0].glob("*.png")]) == 2
    assert re.search(r"cache: .* in .*cache \(deleted the \d+ least recently used files\)", "\n".join(said))
    said.clear()
    again = train(**flags, train_data_dir=tmp_path / "set 3", class_inference_steps=3, latent_cache_limit=1e-6)
    assert shards_in(tmp_path / "cache") == whole[2] | (shards_in(tmp_path / "cache") & whole[1])
    assert "all of them are in the cache already" in "\n".join(said)
    assert "(over --latent_cache_limit 1e-06, but this run needs all of it)" in "\n".join(said)
    assert read_metrics(again)


def test_the_oldest_are_deleted_first_and_only_as_many_as_needed(tmp_path):
    for number, (kind, size) in enumerate(
        [("latents", 700), ("prompts", 300), ("class_pictures", 500), ("latents", 900)]
    ):
        path = tmp_path / kind / (f"{number}" if kind == "class_pictures" else f"{number}.safetensors")
        path.parent.mkdir(exist_ok=True)
        if kind == "class_pictures":
            path.mkdir()
            (path / "00000.png").write_bytes(bytes(size))
        else:
            path.write_bytes(bytes(size))
        os.utime(path, (0, 1000 + [30, 20, 10, 0][number]))
    oldest = tmp_path / "latents" / "3.safetensors"
    line = shards.trim(tmp_path, 1300 / 2**30, [str(oldest)])
    assert oldest.exists(), "it is in use"
    assert not (tmp_path / "class_pictures" / "2").exists()
    assert not (tmp_path / "prompts" / "1.safetensors").exists()
    assert not (tmp_path / "latents" / "0.safetensors").exists()
    assert "deleted the 3 least recently used files" in line
    for kind in ("class_pictures", "latents"):
        assert [path.name for path in (tmp_path / kind).iterdir()] == (["3.safetensors"] if kind == "latents" else [])


def test_a_limit_that_is_kept_deletes_nothing(tmp_path):
    (tmp_path / "latents").mkdir()
    for number in range(3):
        (tmp_path / "latents" / f"{number}.safetensors").write_bytes(bytes(1000))
    assert "deleted" not in shards.trim(tmp_path, 3000 / 2**30, [])
    assert len([*(tmp_path / "latents").iterdir()]) == 3
    assert "deleted the 1 least recently used file)" in shards.trim(tmp_path, 2999 / 2**30, [])
