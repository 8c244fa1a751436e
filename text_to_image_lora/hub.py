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
MOST_SECONDS_TO_WAIT = 60  # before a request is repeated, if a busy server asks for it
DOWNLOAD_SECONDS = 3600  # for a checkpoint
ANSWER_SECONDS = 60  # for a complete answer that is small
REQUEST = "request to the hub"  # name of the threads
_checks_answers = False


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository on the hub (`owner/name` or `name`) and is not an existing local path."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII)) and not os.path.exists(name)


def retry_timeouts(ask: Callable[[], Any], seconds: float | None = None) -> Any:
    """Returns `ask()`, a request to the hub, which is tried up to three times if it times out.

    Raises `TimeoutError` after `seconds` in all. The timeouts of the hub's client are for each piece of an answer, and a
    server that sends a byte at a time would never exceed them. None: no limit, for large files.
    """
    from httpx import TimeoutException

    check_answers()

    def ask_three_times():
        for pause in (1, 2):
            try:
                return ask()
            except TimeoutException:
                time.sleep(pause)
        return ask()

    return ask_three_times() if seconds is None else _within(seconds, ask_three_times)


def check_answers() -> None:
    """Lets the hub's client refuse web pages, and wait for at most `MOST_SECONDS_TO_WAIT` before it repeats a request.

    It would keep the login page of a network in its cache as a file of a model, and would wait for as long as a busy server
    asks, even for a day. Without the server's number, it tries for some seconds.
    """
    global _checks_answers
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make_default = getattr(_http, "default_client_factory", None)  # not part of its public interface
    if _checks_answers or make_default is None:
        return
    _checks_answers = True

    def make_client():
        client = make_default()
        client.event_hooks = client.event_hooks | {
            "response": [*client.event_hooks["response"], _refuse_pages, _forget_long_waits]
        }
        return client

    set_client_factory(make_client)


def _refuse_pages(response):
    """Raises an error for an answer that is a web page, which no file of a model is."""
    from httpx import HTTPError

    if response.is_success and response.headers.get("content-type", "").lower().startswith("text/html"):
        host = response.url.host
        raise HTTPError(
            f"{host} answered with a web page instead of a file; the network may ask for a login in a browser"
        )


def _forget_long_waits(response):
    """Removes the headers that ask to wait for too long from the answer of a busy server."""
    for name in ("retry-after", "ratelimit"):
        numbers = re.findall(r"(?:^|t=)(\d+)", response.headers.get(name, ""))
        is_date = name == "retry-after" and not numbers
        if name in response.headers and (is_date or any(int(n) > MOST_SECONDS_TO_WAIT for n in numbers)):
            del response.headers[name]


def _within(seconds, ask):
    future: Future = Future()

    def run():
        try:
            future.set_result(ask())
        except BaseException as error:  # is raised where it was asked
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=REQUEST).start()
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
    check_answers()
    cached = try_to_load_from_cache(name, file, revision=revision, cache_dir=cache_dir)
    if isinstance(cached, str):
        return Path(cached)
    if not constants.HF_HUB_OFFLINE:
        ask_hub(name, "model", revision)
    return Path(
        retry_timeouts(lambda: hf_hub_download(name, file, revision=revision, cache_dir=cache_dir), ANSWER_SECONDS)
    )
