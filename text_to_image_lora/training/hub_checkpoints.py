"""Checkpoints on the hub, for runs on machines without lasting storage: uploaded during training, and resumed from."""

import logging
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import InputError
from ..files import reason_of, written_whole
from ..hub import ANSWER_SECONDS, DOWNLOAD_SECONDS, create_repository, retry_timeouts, upload_folder
from . import checkpoint
from .manifest import find_damage


logger = logging.getLogger(__name__)
ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/(checkpoint-\d+))?/?")


class Uploads:
    """Uploads checkpoints one at a time in a thread, or none if `repository` is None.

    Each commit holds a whole checkpoint. An upload that fails is logged, training continues, and the next checkpoint is
    uploaded again.
    """

    def __init__(self, repository: str | None, token: str | None):
        self.repository, self.token = repository, token
        self.threads = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def send(self, folder: Path | str) -> None:
        if self.repository is not None:
            self.pending = self.threads.submit(self._upload, self.repository, Path(folder))

    def _upload(self, repository, folder):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        try:
            api = HfApi(token=self.token)
            repo_id = create_repository(api, repository, private=True)
            upload_folder(api, repo_id, folder, path_in_repo=folder.name, commit_message=folder.name)
        except Exception as error:  # the client's errors have no common base class
            logger.info(
                f"{folder.name} was not uploaded ({reason_of(error)}); it is in {folder}, and training continues"
            )

    def wait(self) -> None:
        """Waits until the pending upload has finished or failed."""
        if self.pending is not None:
            self.pending.result()


def find_checkpoint(output_dir: Path | str, wanted: str, token: str | None) -> Path | None:
    """Like `checkpoint.find_checkpoint`, and also finds checkpoints on the hub.

    hf://owner/name stands for the newest intact checkpoint on the hub or in the output folder, into which it is downloaded.
    If there is none, a new run begins, so that a single command both starts and resumes a run.
    """
    if not wanted.startswith("hf:"):
        return checkpoint.find_checkpoint(output_dir, wanted)
    address = ADDRESS.fullmatch(wanted)
    if address is None:
        raise InputError(
            f"--resume_from_checkpoint {wanted}: write hf://owner/name or hf://owner/name/checkpoint-500."
        )
    repository, name = address.groups()
    local = checkpoint.find_newest_intact(checkpoint.list_checkpoints(output_dir))
    try:
        names = retry_timeouts(lambda: _list_names_on_hub(repository, token), ANSWER_SECONDS)
    except Exception as error:  # the client's errors have no common base class
        if local is None or name is not None:
            raise InputError(
                f"{wanted}: the checkpoints can't be listed ({reason_of(error)}). Check the name, the network and the token."
            ) from error
        logger.info(f"{wanted} can't be reached ({reason_of(error)}): using the newest local checkpoint")
        return local
    if name is not None:
        if name not in names:
            raise InputError(f"{wanted}: there is no such checkpoint. There are: {', '.join(names) or 'none'}.")
        downloaded = _download(repository, name, token)
        checkpoint.find_checkpoint(output_dir, str(downloaded))  # raises `InputError` if it is damaged
        return _copy(downloaded, output_dir)
    for name in reversed(names):
        if local is not None and checkpoint.parse_step(local) >= checkpoint.parse_step(Path(name)):
            break
        path = checkpoint.find_newest_intact([_download(repository, name, token)])
        if path is not None:
            return _copy(path, output_dir)
    if local is None and names:  # a new run would upload its checkpoints over these
        raise InputError(
            f"{wanted}: none of its checkpoints is intact, or the network does not transmit them. Run the command again in "
            "another network, or with --resume_from_checkpoint none to start over."
        )
    if local is None:
        logger.info(f"{wanted}: there is no checkpoint yet, so a new run begins")
    return local


def _list_names_on_hub(repository, token):
    """The names of the checkpoints in a repository, oldest first; empty if the repository does not exist yet."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = HfApi(token=token).list_repo_files(repository)
    except RepositoryNotFoundError:
        return []
    names = {file.partition("/")[0] for file in files if file.endswith(f"/{checkpoint.MANIFEST}")}
    found = [name for name in names if checkpoint.NAME.fullmatch(name)]
    return sorted(found, key=lambda name: checkpoint.parse_step(Path(name)))


def _download(repository, name, token):
    """Downloads a checkpoint into the hub's cache, and returns its path there; it may be damaged."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()

    def download(**options):
        found = retry_timeouts(
            lambda: snapshot_download(repository, allow_patterns=f"{name}/*", token=token, **options), DOWNLOAD_SECONDS
        )
        return Path(found) / name

    try:
        path = download()
        # The hub's cache may hold the login page of a network, which was once the answer to a request for a file.
        if find_damage(path) is None:
            return path
        shutil.rmtree(path)  # or the client would leave the names of the files at what they lead to
        return download(force_download=True)
    except Exception as error:  # the client's errors have no common base class
        raise InputError(
            f"{repository}: {name} can't be downloaded ({reason_of(error)}). Run the command again when the network is "
            "back, or with --resume_from_checkpoint latest to resume from a local checkpoint."
        ) from error


def _copy(downloaded, output_dir):
    """Copies a checkpoint into the output folder, replacing an existing one, and returns its path."""
    path = Path(output_dir) / downloaded.name
    with written_whole(path, folder=True) as folder:
        shutil.copytree(downloaded, folder, dirs_exist_ok=True)
    return path
