"""``pyra train`` with FSDP2 on CPUs, for ``torchrun``: accelerate only shards on what it takes for accelerators.

``STOP_AFTER`` in the environment is the step to interrupt at; ``SHARDED True`` is printed where layers are sharded.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.update(
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_TRANSFORMER_CLS_TO_WRAP="Block",
    FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
)

from accelerate import PartialState
from accelerate.utils import DistributedType
from module_and_its_threads import leave_at_once

from pyra.scripts.main import main
from pyra.tasks.fitting import checkpoints
from pyra.tasks.fitting.callbacks import ProgressBar

plain_state, plain_step = PartialState.__init__, ProgressBar.on_step_end


def state(self: Any, *arguments: Any, **more: Any) -> None:
    """Several CPUs count as several GPUs."""
    plain_state(self, *arguments, **more)
    if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def on_step_end(self: Any, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
    """Look at the model, and interrupt."""
    plain_step(self, args, state, control, **more)
    if state.global_step == 1:
        print("SHARDED", checkpoints.is_sharded(model), flush=True)
    if state.global_step == int(os.environ.get("STOP_AFTER", "0")):
        raise KeyboardInterrupt


PartialState.__init__ = state
ProgressBar.on_step_end = on_step_end  # type: ignore[method-assign]
leave_at_once(main(["train", *sys.argv[1:]]))
