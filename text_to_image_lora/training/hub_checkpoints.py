"""Checkpoints on the hub, for runs on machines that keep nothing: uploaded beside the training, and gone on from."""

import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import InputError
from ..files import reason_of, retry_timeouts, written_whole
from . import checkpoint


logger = logging.getLogger(__name__)
ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/(checkpoint-\d+))?/?")


class Uploads:
    """Uploads one checkpoint at a time, while the training goes on; `repository` None: none.

    A commit holds a whole checkpoint or nothing. What fails is told, and the next checkpoint is tried again: the training
    is worth more than its copy.
    """

    def __init__(self, repository, token):
        self.repository, self.token = repository, token
        self.threads, self.under_way = ThreadPoolExecutor(1), None

    def send(self, folder):
        if self.repository is not None:
            self.under_way = self.threads.submit(self._upload, Path(folder))

    def _upload(self, folder):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        try:
            api = HfApi(token=self.token)
            repository = api.create_repo(self.repository, private=True, exist_ok=True).repo_id
            api.upload_folder(
                repo_id=repository, folder_path=folder, path_in_repo=folder.name, commit_message=folder.name
            )
        except Exception as error:  # the client's errors have no common base
            logger.info(f"{folder.name} is not uploaded ({reason_of(error)}); it is in {folder}, and the run goes on")

    def wait(self):
        """Until what is under way has arrived, or has failed."""
        if self.under_way is not None:
            self.under_way.result()


def find_checkpoint(output_dir, wanted, token):
    """The folder that `--resume_from_checkpoint` means, as `checkpoint.find_checkpoint`, or from the hub.

    hf://owner/name is the newest that is whole, there or in the output folder; it is downloaded into that. Where neither
    has one, the run begins: so the same command does for its first start and for all others.
    """
    if not wanted.startswith("hf:"):
        return checkpoint.find_checkpoint(output_dir, wanted)
    address = ADDRESS.fullmatch(wanted)
    if address is None:
        raise InputError(
            f"--resume_from_checkpoint {wanted}: write hf://owner/name, or hf://owner/name/checkpoint-500 for one of several."
        )
    repository, name = address.groups()
    here = checkpoint.newest_whole(checkpoint.list_checkpoints(output_dir))
    try:
        there = retry_timeouts(lambda: _names_on_hub(repository, token))
    except Exception as error:  # the client's errors have no common base
        if here is None or name is not None:
            raise InputError(
                f"{wanted}: the hub does not give its checkpoints ({reason_of(error)}). Check the name, your network and the "
                "token."
            ) from error
        logger.info(f"{wanted} can't be reached ({reason_of(error)}): the newest checkpoint here is taken")
        return here
    if name is not None:
        if name not in there:
            raise InputError(f"{wanted}: there is no such checkpoint. There are: {', '.join(there) or 'none'}.")
        return checkpoint.find_checkpoint(output_dir, str(_download(repository, name, output_dir, token)))
    for name in reversed(there):
        if here is not None and checkpoint.step_of(here) >= checkpoint.step_of(Path(name)):
            break
        path = checkpoint.newest_whole([_download(repository, name, output_dir, token)])
        if path is not None:
            return path
    if here is None:
        logger.info(f"{wanted}: there is no checkpoint yet, so the run begins")
    return here


def _names_on_hub(repository, token):
    """The names of the checkpoints in a repository, oldest first; none where there is no such repository yet."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = HfApi(token=token).list_repo_files(repository)
    except RepositoryNotFoundError:
        return []
    names = {file.partition("/")[0] for file in files if file.endswith(f"/{checkpoint.MANIFEST}")}
    return sorted(
        (name for name in names if checkpoint.NAME.fullmatch(name)), key=lambda n: checkpoint.step_of(Path(n))
    )


def _download(repository, name, output_dir, token):
    """Fetches a checkpoint into the output folder, in the place of one that is there; returns where it is."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        fetched = retry_timeouts(lambda: snapshot_download(repository, allow_patterns=f"{name}/*", token=token))
    except Exception as error:  # the client's errors have no common base
        raise InputError(
            f"{repository}: {name} can't be fetched ({reason_of(error)}). Run it again when the network is there, or with "
            "--resume_from_checkpoint latest to go on from what is here."
        ) from error
    path = Path(output_dir) / name
    with written_whole(path, folder=True) as folder:
        shutil.copytree(Path(fetched) / name, folder, dirs_exist_ok=True)
    return path
