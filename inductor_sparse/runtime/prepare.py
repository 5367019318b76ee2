"""Store weights so that skipping neurons needs no second copy of them."""

from __future__ import annotations

import torch


def prepare(model: torch.nn.Module) -> list[str]:
    """Store the weight of every ``nn.Linear`` column by column, in place.

    Values, shapes and ``state_dict`` keys stay; only strides change, from ``(in, 1)``
    to ``(1, out)``.  Then no copy is needed: no memory, and nothing that could go
    stale.  Dense products read either order.  Call it before ``torch.compile``, because
    strides are guarded.  Saving formats that insist on contiguous tensors (safetensors)
    need ``.contiguous()`` first.

    A weight that shares its storage with another parameter under a different view is
    left alone, because moving it would untie the two.

    Returns:
        The names of the parameters that were changed.
    """
    owners: dict[int, set[int]] = {}
    for parameter in model.parameters():
        storages = owners.setdefault(parameter.untyped_storage()._cdata, set())
        storages.add(id(parameter))
    changed = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear) or type(weight) is not (
            torch.nn.Parameter
        ):
            continue
        alone = len(owners[weight.untyped_storage()._cdata]) == 1
        whole = weight.untyped_storage().nbytes() == weight.nbytes
        if alone and whole and weight.is_contiguous() and min(weight.shape) > 1:
            weight.data = weight.data.t().contiguous().t()
            changed.append(f"{name}.weight" if name else "weight")
    return changed
