"""Programmatic dependent launch: a kernel takes its place while the one before ends.

Its blocks then wait on the GPU for the results of that kernel (``griddepcontrol.wait``,
PTX section "Parallel Synchronization and Communication Instructions"), and say when the
next kernel may come (``griddepcontrol.launch_dependents``).  In a chain of kernels of a
few microseconds each, that hides most of the launches.

It is used where CUDA graphs launch the kernels.  Elsewhere the host is what takes long,
and Inductor's fast launcher does not know of it.

A kernel that has waited for the one before has waited for all of them, as long as each
of these has waited itself.  Of those that Inductor launches early (``enable_pdl``) some
do not, such as one that only fills a buffer: beside them ours are launched as usual.
"""

from __future__ import annotations

from typing import Any

import torch

from inductor_sparse import _compat, config


def options(device: torch.device) -> dict[str, Any]:
    """What a Triton template is given so that its kernel is launched like that.

    Nothing where it is not: on GPUs before sm_90, on AMD's, without CUDA graphs, and
    where Inductor does it with its own kernels.
    """
    captured = config.cuda_graphs or _compat.uses_cuda_graphs()
    if not captured or torch.version.hip is not None:
        return {}
    if _compat.has_own_dependent_launches():
        return {}
    if torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"DEPENDENT": True, "triton_meta": {"launch_pdl": True}}
