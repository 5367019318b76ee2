"""What happened, for people: the explain table, calibration, and their renderers.

The package can be called: ``inductor_sparse.report()`` is
:func:`inductor_sparse.report.sites.report`.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inductor_sparse.report.sites import SiteReport


class _CallablePackage(types.ModuleType):
    """A package whose name is also that of its one function."""

    def __call__(self) -> SiteReport:
        """See :func:`inductor_sparse.report.sites.report`."""
        from inductor_sparse.report import sites

        return sites.report()


sys.modules[__name__].__class__ = _CallablePackage
