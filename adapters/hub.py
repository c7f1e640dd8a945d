"""An adapter folder on the hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from pyra.adapters.card import CardInfo, is_ours
from pyra.adapters.folder import CARD, PEFT_FILE, PYRA_FILE, WEIGHTS, one_line
from pyra.adapters.saving import save_adapter
from pyra.errors import CheckpointError, OutputError


def push_adapter(
    model: nn.Module,
    repo_id: str,
    *,
    card: CardInfo | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload adapter",
) -> str:
    """Push what :func:`pyra.adapters.save_adapter` writes to a repository of the hub, in one commit.

    ``model.push_to_hub`` sends the same adapter with PEFT's model card in the place of pyra's, and leaves what an older
    adapter left in the repository. Here that goes, and a ``README.md`` that somebody wrote there stays.

    Args:
        model: from :func:`pyra.adapters.adapt`.
        repo_id: ``"owner/name"``; created if missing.
        card: as in :func:`pyra.adapters.save_adapter`.
        private: whether a new repository is private; None takes the owner's default.
        token: None takes the one of ``hf auth login``.
        revision: branch; None means the main one.
        create_pr: open a pull request instead of writing to the branch.
        commit_message: first line of the commit.

    Returns:
        The address of the commit.

    Raises:
        ConfigError, CheckpointError: as :func:`pyra.adapters.save_adapter` does, before anything is sent.
        OutputError: where the hub refuses, with its reason.

    Example:
        >>> push_adapter(model, "me/my-adapter", card=CardInfo(task="eurosat"))  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, card)
        api = HfApi(token=token)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not _card_is_ours(api, repo, revision):
                (Path(folder) / CARD).unlink()
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                delete_patterns=[name for name in (PEFT_FILE, PYRA_FILE) if not (Path(folder) / name).exists()],
            )
        except (OSError, HFValidationError) as error:
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"{repo_id} was not written: {reason}; log in with `hf auth login` or give a token that may write there"
            ) from None
    return str(commit.commit_url)


def local_folder(folder: str | Path, revision: str | None = None) -> Path:
    """Return a folder as it is, and for ``"owner/name"`` that is none the hub's files of that name, fetched.

    Nothing but weights in safetensors and the two JSON files is fetched.

    Raises:
        CheckpointError: where the hub has no such repository, or cannot be reached.
    """
    path = Path(folder)
    if path.exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) is None or str(folder).startswith("."):
        return path
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=[WEIGHTS, PEFT_FILE, PYRA_FILE]))
    except (OSError, HFValidationError) as error:
        raise CheckpointError(
            f"{folder} is no folder here, and the hub did not give a repository of that name: {one_line(error)}"
        ) from None


def _card_is_ours(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        return is_ours(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
    except LocalEntryNotFoundError:  # the hub was not reached
        raise
    except EntryNotFoundError:
        return True
