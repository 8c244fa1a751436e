"""Requests to the hub, with limits of time."""

import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any


HUB_SECONDS = 3  # timeout of a request to the hub: without a network, its client would retry for half a minute
UPLOAD_SECONDS = 300  # for an upload, and in addition its size by the slowest speed
SLOWEST_UPLOAD = 100_000  # bytes per second
ANSWER_SECONDS = 60  # for a complete answer that is small


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository on the hub (`owner/name` or `name`) and is not an existing local path."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII)) and not os.path.exists(name)


def retry_timeouts(ask: Callable[[], Any], seconds: float | None = None) -> Any:
    """Returns `ask()`, a request to the hub, which is tried up to three times if it times out.

    Raises `TimeoutError` after `seconds` in all. The timeouts of the hub's client are for each piece of an answer, and a
    server that sends a byte at a time would never exceed them. None: no limit, for large files.
    """
    from httpx import TimeoutException

    def ask_three_times():
        for pause in (1, 2):
            try:
                return ask()
            except TimeoutException:
                time.sleep(pause)
        return ask()

    return ask_three_times() if seconds is None else _within(seconds, ask_three_times)


def _within(seconds, ask):
    future: Future = Future()

    def run():
        try:
            future.set_result(ask())
        except BaseException as error:  # is raised where it was asked
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        if future.done():  # its own
            raise
        raise TimeoutError(f"the server did not answer completely within {seconds:g} seconds") from None


def ask_hub(name: str, kind: str, revision: str | None = None) -> None:
    """Checks that the hub has this repository (`kind` is "model" or "dataset"); raises the errors of the hub's client."""
    from huggingface_hub import HfApi

    retry_timeouts(
        lambda: HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=HUB_SECONDS), ANSWER_SECONDS
    )


def create_repository(api: Any, name: str, *, private: bool | None = None) -> str:
    """Creates a repository on the hub unless it exists, and returns its full name."""
    return retry_timeouts(lambda: api.create_repo(name, private=private, exist_ok=True).repo_id, ANSWER_SECONDS)


def upload_folder(api: Any, repo_id: str, folder: Path, **options: Any) -> Any:
    """Uploads the files of a folder in one commit; raises `TimeoutError` if the server is silent, or very slow."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = UPLOAD_SECONDS + size / SLOWEST_UPLOAD
    return _within(seconds, lambda: api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def hub_file(name, file, *, revision=None, cache_dir=None):
    """Returns the local path of a small file of a hub model, which is downloaded if it is not in the cache.

    Raises the errors of the hub's client if neither the cache nor the hub has the file.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    cached = try_to_load_from_cache(name, file, revision=revision, cache_dir=cache_dir)
    if isinstance(cached, str):
        return Path(cached)
    if not constants.HF_HUB_OFFLINE:
        ask_hub(name, "model", revision)
    return Path(
        retry_timeouts(lambda: hf_hub_download(name, file, revision=revision, cache_dir=cache_dir), ANSWER_SECONDS)
    )
