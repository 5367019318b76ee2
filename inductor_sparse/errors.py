"""The errors a user can meet; each message names the culprit and the remedy."""

from __future__ import annotations


class SparseError(Exception):
    """Base class of every error raised by ``inductor_sparse``."""


class SparseOptionError(SparseError, ValueError):
    """An option is unknown or has the wrong type or value."""


class SparseShapeError(SparseError, ValueError):
    """A tensor given to an op has a shape or dtype that the op does not define."""


class SparseKernelError(SparseError, RuntimeError):
    """A GPU kernel cannot be compiled, loaded, given its arguments or launched."""


class SparsePlanError(SparseError, ValueError):
    """A plan file cannot be read, or was made for another model."""


class NothingAppliedError(SparseError, RuntimeError):
    """``sparse.strict`` is set and no site of the compiled graph was rewritten."""


class CheckpointError(SparseError, ValueError):
    """A checkpoint is missing, corrupt, or of another model."""
