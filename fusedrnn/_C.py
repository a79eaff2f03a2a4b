"""The compiled module `fusedrnn_C`, checked: its functions are declared in _C.pyi.

It stands outside the package so that the sources in a clone find the installed binary. Loading it
loads the ops, which are beside it in a library that needs no Python.
"""

import re
from pathlib import Path

import torch  # its libraries have the symbols that the binary needs

from fusedrnn._version import __version__


def _check() -> None:
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        raise ImportError(f"fusedrnn needs torch >= 2.10 and finds {torch.__version__}; upgrade it")
    try:
        import fusedrnn_C
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fusedrnn_C":
            message = "fusedrnn is not compiled; run `pip install .` in the folder of its sources"
        else:
            message = f"the compiled part of fusedrnn cannot be loaded ({error}); install it again"
        raise ImportError(message) from None
    found = getattr(fusedrnn_C, "__version__", "unknown")
    if found != __version__:
        raise ImportError(
            f"fusedrnn is version {__version__} and its compiled part {fusedrnn_C.__file__} is"
            f" version {found}; run `pip install .` in the folder of the sources"
        )


_check()

import fusedrnn_C  # noqa: E402
from fusedrnn_C import *  # noqa: E402, F403

LIBRARY = str(Path(fusedrnn_C.__file__).with_name("libfusedrnn.so"))
