"""What the files that a person writes are checked with: strict, frozen, every key known."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

# A sentence that may not be left blank.
Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]


class Frozen(BaseModel):
    """A part of such a file: immutable, every key known, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
