"""Image-classification data sets of the Hugging Face hub, read as folders of parquet files are.

Nothing from the hub is run: the `datasets` library reads files only. An id is ``owner/name``, ``owner/name:config`` for
one of several configurations, and ``owner/name@revision`` for a fixed state.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub

from pyra.errors import DataError, did_you_mean
from pyra.tasks.data.columns import FOUND, Columns
from pyra.tasks.data.folders import Splits, divide, finish, split_of
from pyra.tasks.data.rows import Rows, read_table

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?(?:@([\w./-]+))?", re.ASCII)
_CONFIGS = re.compile(r"available configs: \[(.*?)\]|Available: \[(.*?)\]", re.DOTALL)


class HubError(DataError):
    """A data set of the hub that cannot be fetched; where there is another way, the caller says so."""


@dataclass(frozen=True)
class HubId:
    """A data set of the hub."""

    repository: str
    config: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Return the id that ``text`` is, or None.

        >>> HubId.parse("ufldl-stanford/svhn:cropped_digits@main")
        HubId(repository='ufldl-stanford/svhn', config='cropped_digits', revision='main')
        >>> HubId.parse("photos/")
        """
        match = _ID.fullmatch(text)
        return cls(*match.groups()) if match else None

    @property
    def name(self) -> str:
        """The name without its owner."""
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return self.repository + config + (f"@{self.revision}" if self.revision else "")


def read_hub(source: HubId, columns: Columns = FOUND) -> tuple[Splits, str]:
    """Fetch the splits of a data set (at least ``train`` and ``test``) and say in a sentence how they were found.

    Splits are told by their names, as files are (:mod:`pyra.tasks.data.folders`); those of other names are left out.
    What was fetched before is read from the cache of the `datasets` library, also without a network.

    Raises:
        HubError: where it cannot be fetched.
        DataError: where its columns or its splits are not those of a classification task.
    """
    parts: dict[str, list[Rows]] = defaultdict(list)
    found = fetched(source)
    for name, rows in found.items():
        if split := split_of(name):
            table = rows.with_format("arrow")[:]
            parts[split].append(read_table(table, rows.features, f"{source} {name}", columns, _caches()))
    where = f"{source} of the Hugging Face hub"
    if not parts:
        raise DataError(f"{where} has no split called train or test, only {', '.join(found)}")
    if list(parts) == ["train"]:
        return divide(parts["train"], where)
    return finish(parts, where)


def fetch(source: HubId) -> Mapping[str, datasets.Dataset]:
    """Download a data set, or find it in the cache of the `datasets` library: the one place that reaches the hub."""
    found = datasets.load_dataset(source.repository, source.config, revision=source.revision)
    assert isinstance(found, datasets.DatasetDict)  # no split was asked for
    return found


def fetched(source: HubId) -> Mapping[str, datasets.Dataset]:
    """Return every split of a data set, by the hub's name for it.

    Raises:
        HubError: where it cannot be fetched.
        DataError: where one of several configurations has to be named.
    """
    try:
        with _progress():
            return fetch(source)
    except datasets.exceptions.DatasetNotFoundError as error:
        gated = "gated" in str(error).lower()
        reason = "it is gated: accept its terms there, then `hf auth login`" if gated else "no such public data set"
    except ConnectionError:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE
        reason = "HF_HUB_OFFLINE is set and it was not fetched before" if offline else "the hub cannot be reached"
    except Exception as error:  # what files of anybody raise in a library that reads dozens of formats
        if configs := _CONFIGS.search(str(error)):
            names = re.findall(r"[\w.-]+", configs[1] or configs[2])
            hint = did_you_mean(source.config or "", names)
            raise DataError(
                f"{source} of the Hugging Face hub has the configurations {', '.join(names)}{hint}: "
                f"name one, as {source.repository}:{names[0]}"
            ) from None
        reason = " ".join((next(iter(str(error).splitlines()), "") or type(error).__name__).split())
    raise HubError(f"{source} cannot be fetched from the Hugging Face hub ({reason})")


@contextmanager
def _progress() -> Iterator[None]:
    """Show the bars of a download, which may take long, also where those of the library are off."""
    off = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    try:
        yield
    finally:
        if off:
            datasets.disable_progress_bars()


def _caches() -> Sequence[Path]:
    """Return the folders that images which are stored as paths may lie in: those the library downloads to."""
    return [Path(huggingface_hub.constants.HF_HUB_CACHE).resolve(), Path(datasets.config.HF_CACHE_HOME).resolve()]
