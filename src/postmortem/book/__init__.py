"""Run notebooks, publish records, build pages: what the extra `book` is installed for."""

from importlib.util import find_spec

# Said before anything is done, and not by the first step that lacks it.
if find_spec("papermill") is None:
    raise ModuleNotFoundError("no papermill", name="papermill")
