"""How one of several processes begins and ends."""

import atexit
import os
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from accelerate import PartialState


def find_processes() -> "PartialState":
    """The processes that `accelerate launch` or `torchrun` started, this one alone without them; each with its device."""
    import torch
    from accelerate import PartialState

    # Without being told, it does not join processes on a machine that has CPUs alone.
    return PartialState(cpu=not torch.accelerator.is_available())


def leave_group(state: "PartialState", status: int) -> None:
    """
    Leaves the other processes, which wait for nothing more from this one. On the CPU it ends the process, with `status`.

    Args:
        state ([`accelerate.PartialState`]): the processes; nothing happens where there is one.
        status (`int`): of the process.
    """
    if state.num_processes == 1:
        return
    if state.device.type != "cpu":
        state.destroy_process_group()
        return
    # gloo's threads now and then abort a process that Python takes apart (torch 2.13): leave before that.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
