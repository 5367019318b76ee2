"""Store weights so that skipping neurons needs no second copy of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from inductor_sparse.errors import SparseOptionError


def prepare(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Store weights of ``nn.Linear`` column by column, in place.

    Values, shapes and ``state_dict`` keys stay; only strides change, from ``(in, 1)``
    to ``(1, out)``.  Then no copy is needed: no memory, and nothing that could go
    stale.  Dense products read either order.  Call it before ``torch.compile``, because
    strides are guarded.  Saving formats that insist on contiguous tensors (safetensors)
    need ``.contiguous()`` first.

    A weight that shares its storage with another parameter under a different view is
    left alone, because moving it would untie the two.

    Args:
        model: the module that has the layers, or is one; their weights may have any
            dtype and device.  Those of a tensor subclass, as sharded ones are, are left
            alone.
        names: the layers to change, as ``model.named_modules()`` names them.  Without
            it those that do not widen, ``out_features <= in_features``: the down
            projections are among them, and the up projection of a gated FFN, whose
            rows are read as they are stored, is not.

    Returns:
        The names of the parameters that were changed.

    Raises:
        SparseOptionError: the model has no ``nn.Linear`` of that name.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    wanted = [name for name, linear in linears.items() if not _widens(linear)]
    if names is not None:
        wanted = list(dict.fromkeys(names))
        _check_names(wanted, linears)
    owners = _owners(model)
    changed = []
    for name in wanted:
        weight = linears[name].weight
        if type(weight) is nn.Parameter and _may_move(weight, owners):
            weight.data = weight.data.t().contiguous().t()
            changed.append(f"{name}.weight" if name else "weight")
    return changed


def _widens(linear: nn.Linear) -> bool:
    return linear.out_features > linear.in_features


def _check_names(names: Iterable[str], linears: Iterable[str]) -> None:
    for name in names:
        if name not in linears:
            near = difflib.get_close_matches(name, linears, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SparseOptionError(f"the model has no nn.Linear named {name!r}{hint}")


def _owners(model: nn.Module) -> dict[int, set[int]]:
    """The parameters in each storage."""
    owners: dict[int, set[int]] = {}
    for parameter in model.parameters():
        storages = owners.setdefault(parameter.untyped_storage()._cdata, set())
        storages.add(id(parameter))
    return owners


def _may_move(weight: nn.Parameter, owners: dict[int, set[int]]) -> bool:
    storage = weight.untyped_storage()
    alone = len(owners[storage._cdata]) == 1
    whole = storage.nbytes() == weight.nbytes
    return alone and whole and weight.is_contiguous() and min(weight.shape) > 1
