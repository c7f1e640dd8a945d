"""Ways to merge a decoder's prompts side by side, without training; ``python -m pyra.scripts.study_prompts``.

Of each right answer of a task's test split: how much less likely it is, in nats a token, where prompts merge.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse
from pyra.scripts.studies import several_ways, told

_SETTINGS = (
    "rate: 0.5; rate: 0.5, size_bias: true; rate: 0.5, size_bias: false; rate: 0.5, rule: drop; "
    "rate: 0.5, rule: truncate; rate: 0.5, rule: bipartite; preset: safe"
)


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    backbone: str = option("", "folder of a decoder, or a name on the hub")
    task: str = option("copy", "a language task that is answered by prompt")
    root: str | None = option(None, "folder with a folder of each task's files")
    data: str | None = option(None, "folder with the task's files themselves")
    settings: str = option(_SETTINGS, "options of PyraConfig, as YAML without braces; several with ; between them")
    limit: int = option(16, "test examples (a fixed draw)")
    batch_size: int = option(1, "examples a forward")
    device: str = option("auto", "auto, cpu or cuda")
    output: str = option("prompts.json", "file for the rows")


def main(argv: Sequence[str] | None = None) -> int:
    """Score under every setting, print a table and write the rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_prompts",
        description="Compare ways to merge prompts by the likelihood of right answers, without training.",
        example=(
            "python -m pyra.scripts.study_prompts --backbone models/smollm2 --task copy --data data/gsm8k --limit 16 "
            "--settings 'rate: 0.5; keep: {20: 0.25}'"
        ),
    )
    if options.limit < 1 or options.batch_size < 1:
        raise ConfigError("--limit and --batch-size must be at least 1")
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()  # before anything else loads them
    from pyra.config import PyraConfig

    settings = several_ways("--settings", options.settings, "rate: 0.5, rule: drop")
    configs = {name: PyraConfig.from_dict({"reactivation": False, **values}) for name, values in settings.items()}
    from pyra.files import write_json
    from pyra.tasks.language.prompt_study import study_prompts, study_table

    found = study_prompts(options.backbone, options.task, options.root, options.data, configs, options)
    print(study_table(found["rows"]))
    write_json(options.output, {"options": told(options, ("root", "data", "output")), **found})
    print(f"written to {options.output} (nats a token; differences in pairs, with their standard error)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
