"""A snapshot is a copy of the state, which nothing that training does can change."""

from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo.engine.snapshot import Snapshots

Pair = namedtuple("Pair", "left right")


def snapshot(state: Any) -> Any:
    return Snapshots().take("state", state)


def test_every_tensor_is_copied_wherever_it_is() -> None:
    tensor = torch.ones(4)
    state: dict[str, Any] = {
        "list": [tensor],
        "tuple": (tensor, 1),
        "named": Pair(tensor, "x"),
        "view": tensor[1:3],
        "parameter": nn.Parameter(tensor.clone()),
        "step": torch.tensor(3.0),
    }
    taken = snapshot(state)
    for part in (tensor, state["parameter"].data, state["step"]):
        part.zero_()
    assert taken["list"][0].tolist() == [1, 1, 1, 1]
    assert taken["tuple"][0].tolist() == taken["named"].left.tolist() == [1, 1, 1, 1]
    assert taken["view"].tolist() == [1, 1]
    assert taken["parameter"].tolist() == [1, 1, 1, 1]
    assert not taken["parameter"].requires_grad
    assert taken["step"] == 3
    assert isinstance(taken["named"], Pair)
    assert state["list"][0] is tensor


def test_tied_weights_stay_tied_and_different_views_of_one_tensor_do_not_become_one() -> None:
    weight = torch.arange(6.0)
    taken = snapshot({"in": weight, "out": weight, "half": weight[:3], "turned": weight.view(2, 3)})
    assert taken["in"] is taken["out"]
    assert taken["half"].tolist() == [0, 1, 2]
    assert taken["turned"].shape == (2, 3)
    empty = snapshot([torch.empty(0), torch.empty(0, 3)])
    assert [tensor.shape for tensor in empty] == [torch.Size([0]), torch.Size([0, 3])]


def test_what_is_no_tensor_is_copied_too_and_keeps_its_class(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    state = {"model": module.state_dict(), "groups": [{"lr": 1.0, "params": [0]}], "shape": torch.Size([2])}
    taken = snapshot(state)
    state["groups"][0]["lr"] = 2.0  # type: ignore[index]
    state["groups"][0]["params"].append(1)  # type: ignore[index]
    assert taken["groups"] == [{"lr": 1.0, "params": [0]}]
    assert isinstance(taken["model"], OrderedDict)
    assert taken["model"]._metadata == module.state_dict()._metadata
    assert isinstance(taken["shape"], torch.Size)
    torch.save(taken, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["model"].keys() == {"weight", "bias"}


def test_the_memory_of_a_copy_is_used_again_and_holds_the_new_state() -> None:
    copies, weight = Snapshots(), torch.arange(6.0).reshape(2, 3)
    state = {"in": weight, "out": weight, "turned": weight.t(), "step": torch.tensor(1.0)}
    first = copies.take("engine", state)
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    weight += 10
    state["step"] += 1
    other = copies.take("other", state)
    second = copies.take("engine", state)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == places
    assert not {tensor.data_ptr() for tensor in other.values()} & {*places.values()}
    for name, tensor in state.items():
        assert torch.equal(second[name], tensor), name
        assert second[name].stride() == tensor.stride()


def test_a_state_that_has_changed_its_shape_gets_other_memory() -> None:
    copies = Snapshots()
    copies.take("engine", [torch.zeros(2), torch.zeros(3), torch.zeros(2, 2)])
    state = [torch.ones(2), torch.ones(4), torch.ones(3), torch.ones(2, 2).bool(), torch.ones(5)]
    for copied, tensor in zip(copies.take("engine", state), state, strict=True):
        assert torch.equal(copied, tensor)
        assert copied.dtype == tensor.dtype
    assert len(copies.take("engine", state[:1])) == 1
