"""Processes that see the same batches must end where one alone ends; one that is lost is told of."""

import multiprocessing
import os

import pytest
import torch
from torch import nn

from dm3d_deploy.errors import Dm3dError
from dm3d_deploy.training.team import Team


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def member(rank, meeting, told):
    """What each of two processes does: see its half of four rows, exchange, then be left by the other."""
    torch.set_num_threads(1)
    team = Team(rank, 2, meeting)
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    rows = torch.arange(12, dtype=torch.float32).view(4, 3)[2 * rank : 2 * rank + 2]
    model(rows).square().mean().backward()
    shared = team.average_gradients(model.parameters(), torch.tensor([float(rank), 10.0]))
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(float(rank))
    team.average_buffers(norm)
    told.put((rank, model.weight.grad.flatten().tolist(), shared.tolist(), norm.running_mean.tolist()))
    told.close()
    told.join_thread()
    if rank == 1:
        os._exit(3)
    try:
        team.average(torch.ones(1))
    except Dm3dError as error:
        os._exit(7 if "a training process of 2 ended early" in str(error) else 8)


def test_two_processes_average_and_a_lost_one_is_noticed(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    members = [context.Process(target=member, args=(rank, tmp_path / "meeting", told)) for rank in range(2)]
    for process in members:
        process.start()
    answers = sorted(told.get(timeout=120) for _ in range(2))
    for process in members:
        process.join(timeout=120)
    assert [process.exitcode for process in members] == [7, 3]
    # by hand: the gradient of the mean square over all four rows is the mean of 2 * sum(row) * row
    rows = torch.arange(12, dtype=torch.float64).view(4, 3)
    expected = (2 * rows.sum(dim=1, keepdim=True) * rows).mean(dim=0).tolist()
    for rank, (place, gradient, shared, running) in enumerate(answers):
        assert place == rank
        assert gradient == pytest.approx(expected)
        assert shared == [0.5, 10.0]
        assert running == [0.5, 0.5]


def test_alone_nothing_changes() -> None:
    model, team = small_model(), Team()
    model(torch.ones(5, 3)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    shared = team.average_gradients(model.parameters(), torch.tensor([2.0]))
    team.average_buffers(model)
    team.leave()
    assert team.leads
    assert shared.tolist() == [2.0]
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))
