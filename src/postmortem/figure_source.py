"""What the figures draw from."""

from collections.abc import Mapping
from dataclasses import dataclass

from postmortem.case import Case
from postmortem.records import Measure, Prediction, RecordFile


class NotDrawable(Exception):
    """These records do not hold what a figure shows; the message says what is absent."""


@dataclass(frozen=True)
class Source:
    """What the figures draw from: record files by notebook, and the case."""

    files: Mapping[str, RecordFile]
    case: Case

    def answers(self, stem: str, prompt: str, system: str = "") -> list[Prediction]:
        """The predictions of one system on a prompt, the first system's without a name."""
        found = self.files[stem].of(Prediction) if stem in self.files else []
        asked = [p for p in found if p.prompt == prompt]
        name = system or (asked[0].system if asked else "")
        return [p for p in asked if p.system == name]

    def measures(self, stem: str) -> dict[str, Measure]:
        """A notebook's measures that have a value, by key."""
        if stem not in self.files:
            raise NotDrawable(f"no records of the notebook {stem}")
        return {m.key: m for m in self.files[stem].of(Measure) if m.value is not None}
