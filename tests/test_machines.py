"""Several machines without a shared folder, as two launchers on the loopback with separate working directories."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, TORCHRUN, read_lora, read_metrics, run_command


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_two_machines(folders, words, timeout=180):
    """Runs the command with one process on each machine, and returns (exit code, output) of each."""
    port, started = free_port(), []
    for number, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(number), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        started.append(
            subprocess.Popen(
                [*launcher, ROOT / "train_text_to_image_lora.py", *map(str, words[number])],
                cwd=folder,
                env=os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets")},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        )
    said = [process.communicate(timeout=timeout)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said)]


def words_of(arguments, tmp_path, **changes):
    """Returns the flags of the command for each machine, with separate folders."""
    common = dict(output_dir="out", latent_cache_dir="cache", train_batch_size=1, checkpointing_steps=2) | changes
    return [arguments(**common), arguments(**common)]


@pytest.mark.long
def test_two_machines_without_a_shared_folder_resume_together(arguments, tmp_path):
    """Runs without --seed; only the first machine has a checkpoint, and both must resume from it."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for steps in (2, 4):
        ends = on_two_machines(folders, words_of(arguments, tmp_path, seed=None, max_train_steps=steps))
        assert [code for code, _ in ends] == [0, 0], ends
    assert "resuming from out/checkpoint-2 (step 2)" in ends[0][1]
    assert (folders[0] / "out" / "checkpoint-4").is_dir()
    assert not list(folders[1].glob("out/checkpoint-*"))
    # The result equals that of two processes on one machine without an interruption.
    seed = yaml.safe_load((folders[0] / "out" / "run.yaml").read_text())["seed"]
    straight = arguments(output_dir=tmp_path / "straight", train_batch_size=1, max_train_steps=4, seed=seed)
    done = run_command(straight, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    first, second = read_lora(folders[0] / "out"), read_lora(tmp_path / "straight")
    assert all(torch.equal(first[name], second[name]) for name in second)
    losses = [
        [row["train_loss"] for row in read_metrics(folder)] for folder in (folders[0] / "out", tmp_path / "straight")
    ]
    assert losses[0] == losses[1]


@pytest.mark.long
def test_a_machine_with_other_pictures_is_an_error_on_all(arguments, pictures, tmp_path):
    """One caption differs on the second machine, and no process waits for another."""
    shutil.copytree(pictures, tmp_path / "other")
    table = tmp_path / "other" / "metadata.jsonl"
    table.write_text(table.read_text().replace("red", "green", 1))
    words = words_of(arguments, tmp_path)
    words[1][words[1].index("--train_data_dir") + 1] = str(tmp_path / "other")
    for code, said in on_two_machines([tmp_path / "first", tmp_path / "second"], words):
        assert code != 0
        assert "Process 1 and process 0 have different settings or pictures: dataset. Run the same command" in said


@pytest.mark.long
def test_a_damaged_checkpoint_on_the_first_machine_is_passed_over_on_all(arguments, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    assert [code for code, _ in on_two_machines(folders, words_of(arguments, tmp_path))] == [0, 0]
    (folders[0] / "out" / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    ends = on_two_machines(folders, words_of(arguments, tmp_path, max_train_steps=4))
    for code, said in ends:
        assert code == 0, said
        assert "resuming from" not in said
    assert "out/checkpoint-2: this checkpoint is damaged (optimizer.pt has changed since it was written)" in ends[0][1]
    assert [row["step"] for row in read_metrics(folders[0] / "out")] == [1, 2, 3, 4]
