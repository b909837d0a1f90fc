"""How one of several processes ends."""

import atexit
import os
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from accelerate import PartialState


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
