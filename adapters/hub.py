"""An adapter folder on the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from pyra.adapters.card import CardInfo, is_ours
from pyra.adapters.folder import CARD, PEFT_FILE, PYRA_FILE
from pyra.adapters.saving import save_adapter
from pyra.errors import ConfigError, OutputError


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
    if not isinstance(repo_id, str):
        raise ConfigError(f"a repository of the hub is called 'owner/name', got {repo_id!r}")
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


def _card_is_ours(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        return is_ours(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
    except LocalEntryNotFoundError:  # the hub was not reached
        raise
    except EntryNotFoundError:
        return True
