"""An answer to which base an adapter belongs to, for people and machines."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from postmortem.membership import Judged, Membership, say
from postmortem.untrusted import printable

STANDS = {True: "beats its controls", False: "does not beat them", None: "open"}


def as_membership(found: Membership) -> str:
    """Write the answer first, then each candidate, and what could not be tried."""
    return "\n".join(_lines(found))


def say_answer(found: Membership) -> str:
    """The answer in words."""
    names = ", ".join(found.remain)
    if found.answer == "none":
        return "none of these"
    return names if found.answer == "one" else f"cannot separate: {names}"


def _lines(found: Membership) -> Iterator[str]:
    yield f"{printable(say_answer(found), 2000)}"
    yield printable(found.because, 500)
    if found.judged:
        yield ""
        yield f"{found.texts} texts, {found.tokens:,} tokens; nat a token, with 95 % intervals"
    yield from (_candidate(judged) for judged in found.judged)
    yield from (
        f"  {printable(name)}: left out, {printable(why, 240)}"
        for name, why in found.left_out.items()
    )
    yield from (f"note: {note}" for note in found.notes)


def _candidate(judged: Judged) -> str:
    return (
        f"  {printable(judged.name)}: gain {say(judged.gain)}, over {judged.control} "
        f"{say(judged.over_control)}: {STANDS[judged.stands]}"
    )


def as_membership_json(found: Membership) -> str:
    """Write the answer as JSON: answer, remain, because, judged, left_out, notes, counts."""
    return json.dumps(asdict(found), indent=2, ensure_ascii=False)
