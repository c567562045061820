"""How a command ends."""

import pytest
import torch.distributed as distributed

from genssm.errors import cli


def test_a_finished_command_leaves_its_process_group() -> None:
    """Threads of the group that outlive the interpreter end the process with SIGABRT, now and then."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with pytest.raises(SystemExit) as end:
        cli(lambda: None)
    assert end.value.code == 0
    assert not distributed.is_initialized()
