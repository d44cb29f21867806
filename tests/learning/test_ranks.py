"""What the ranks of a run say to one another."""

from pathlib import Path

import pytest
import torch

from aam.config import RunOptions
from aam.errors import InputError, log
from aam.learning import distributed, launch
from tests.processes import fork_ranks


def agree() -> int:
    """Work of every rank; 0 if all is as expected."""
    launch.begin()
    device = launch.start(RunOptions(output_dir=Path(), device="cpu"))
    rank = distributed.rank()
    log(f"said by {rank}")
    assert device.type == "cpu" and distributed.world_size() == 2
    assert distributed.broadcast(rank) == 0
    assert distributed.all_reduce_max(rank) == 1
    distributed.check_equal("the data", 5)
    with pytest.raises(InputError, match=r"^the data of rank 1 differs from that of"):
        distributed.check_equal("the data", rank)
    group = distributed.RankGroup()
    rows = group.gather(torch.full((rank + 1, 2), float(rank)), [1, 2])
    assert rows.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert group.any(rank == 1, device) and not group.any(False, device)
    weights = torch.nn.ParameterList([torch.ones(2) * (rank + 1) for _ in range(3)])
    weights[0].grad = torch.ones(2)
    if rank:
        weights[1].grad = torch.ones(2)
    group.all_reduce_gradients(weights)
    assert [None if one.grad is None else one.grad.tolist() for one in weights] == [
        [2, 2], [1, 1], None,
    ]  # fmt: skip
    group.broadcast_weights(weights)
    assert weights[2].tolist() == [1, 1]
    distributed.leave()
    return 0


@pytest.mark.parametrize("slurm", [False, True])
def test_ranks_agree_and_only_rank_0_speaks(slurm):
    ranks = fork_ranks(2, agree, slurm)
    assert [one.end() for one in ranks] == [(0, "said by 0\n"), (0, "")]
