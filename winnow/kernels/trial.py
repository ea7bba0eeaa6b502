"""Kernels that are tried on their device before they are used: Triton's if that works."""

import logging
from typing import Any

from winnow.catalog import load
from winnow.errors import one_line

logger = logging.getLogger(__name__)


def passes(trial: str, *args: Any, otherwise: str) -> bool:  # noqa: ANN401 - the trial's own
    """Whether a kernel's trial on its device passes; else one line of the log says why.

    trial: `module:function`.  otherwise: what is done without the kernel, and its name.
    """
    try:
        load(trial)(*args)
    except Exception as error:  # Triton, its compiler and its driver each have errors of their own
        logger.warning("%s fails here: %s", otherwise, one_line(error))
        return False
    return True
