"""The battery: each test, the words for how it can come out, and what it costs and needs.

The words mean the same on every base and under every contract of a prompt, so that what was seen
in replays on one base speaks about another: sizes are coarse, and values are told by their form.
How a test is run stands in `subject`, where models are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from postmortem.case.schema import Case
from postmortem.checker.errors import catalogue
from postmortem.diagnosis.likelihoods import Experiment

# The states in which a subject is asked: the base on all rows and on a few, the adapter as it was
# saved on all rows and on a few, switched off on a few, changed, and another one in its place.
BASE, FIRST, SAVED, STARTED = "base", "base on few rows", "as saved", "as saved, on few rows"
OFF = "off"
EIGHTH, EIGHTFOLD, FLIPPED = "at 1/8", "at 8", "sign flipped"
SHIFTED, BACK, ROTATED = "layers shifted", "layers shifted back", "rotated at random"
OTHERWISE, REFERENCE = "in the other markup", "reference"
ALONE = (BASE, FIRST)
# States that are asked on a few rows, and those whose effect shows on as many as a replay has: what
# more rows can decide is the order of the rows with the adapter and without.
ON_FEW = (FIRST, STARTED, OFF)
ON_ENOUGH = (EIGHTH, EIGHTFOLD, FLIPPED, SHIFTED, BACK, ROTATED, OTHERWISE)
FEW, ENOUGH = 4, 48
# What a base answers; and an adapter, whose texts of another form are held against the base's.
VALUES = ("one value", "varies", "only 0 and 1")
ANSWERED = (*VALUES, "as the base", "a tag", "another form", "few texts", "many texts")
# What the incident's own tests come to where the adapter does not load: its record has answers.
NO_ANSWER = "no answer"
# The incident's symptom, and the ways in which a run can differ from it.
SYMPTOM = ("all 0.0", "one other value", "mostly one value", "varies", NO_ANSWER)
RANKED = ("ranks", "does not rank", "ranks in reverse", "not finite", NO_ANSWER)


@dataclass(frozen=True, kw_only=True)
class Test:
    """A test: what is done, the outcomes that it can have, what it needs and what it costs.

    What a `pooled` test finds follows from files, prompts or settings alone, whatever the base.
    `states` are those that are asked on all rows; asked before, they cost nothing. It may need
    `labels`, an adapter that has loaded (`loaded`), or one whose `effect` can be changed. On the
    incident's machine it would have cost `hands`, a person's minutes by our judgement, `loads` of
    a model, and `passes` over the rows as long as the second attempt's.
    """

    title: str
    outcomes: tuple[str, ...]
    pooled: bool = False
    states: tuple[str, ...] = ()
    labels: bool = False
    loaded: bool = True
    effect: bool = False
    hands: float = 0.0
    loads: int = 0
    passes: float = 0.0

    def rows(self, count: int) -> int:
        """How many of so many rows it takes."""
        return min(count, ENOUGH) if set(self.states) & set(ON_ENOUGH) else count


# The files, the base without the adapter, then the adapter: some bring weights that change the base
# for all that is asked after them.
TESTS: Mapping[str, Test] = {
    "inspect": Test(
        title="check the adapter's files against the base",
        outcomes=("nothing", *catalogue(), "no adapter"),
        pooled=True,
        loaded=False,
        hands=1,
    ),
    "names": Test(
        title="compare the name of the base in the config with the base",
        outcomes=("the same", "another", "no adapter"),
        pooled=True,
        loaded=False,
        hands=5,
    ),
    "prompt": Test(
        title="print the tokens that the model receives",
        outcomes=("whole", "cut", "another markup"),
        pooled=True,
        loaded=False,
        hands=2,
    ),
    "base-alone": Test(
        title="ask the base without the adapter",
        outcomes=(*VALUES, "no value"),
        states=(BASE,),
        loaded=False,
        hands=2,
        loads=1,
        passes=1,
    ),
    "base-ranks": Test(
        title="rank the rows by the base's log-odds",
        outcomes=("ranks", "does not rank"),
        states=(BASE,),
        labels=True,
        loaded=False,
        hands=5,
        loads=1,
        passes=1,
    ),
    "markup": Test(
        title="ask in the other markup: through the chat template, or without it",
        outcomes=("no better", "better", "not finite"),
        states=(SAVED, OTHERWISE),
        hands=5,
        loads=1,
        passes=1,
    ),
    "reference": Test(
        title="put a sound adapter through the same steps",
        outcomes=("works", "does not work"),
        states=(REFERENCE,),
        labels=True,
        loaded=False,
        hands=10,
        loads=1,
        passes=1,
    ),
    "load": Test(
        title="load the adapter and read what PEFT says of the weights",
        outcomes=("silent", "warns", "raises"),
        pooled=True,
        loaded=False,
        hands=1,
        loads=1,
    ),
    "weights": Test(
        title="look whether the weights look trained or drawn at random",
        outcomes=("trained", "as drawn at random", "all zero", "not finite", "no adapter"),
        pooled=True,
        hands=2,
    ),
    "status": Test(
        title="ask PEFT which adapter answers",
        outcomes=("active", "inactive", "none"),
        pooled=True,
        hands=1,
        loads=1,
    ),
    # Fifty new tokens where the second prompt's answer took about four steps.
    "v1": Test(
        title="ask the first prompt", outcomes=SYMPTOM, states=(SAVED,), hands=5, loads=1, passes=12
    ),
    "v2": Test(
        title="ask the second prompt", outcomes=SYMPTOM, states=(SAVED,), hands=5, loads=1, passes=1
    ),
    "raw-text": Test(
        title="print what is generated, before any parser",
        outcomes=("a decimal", "a bare digit", "a word", "a tag", "nothing", NO_ANSWER),
        states=(SAVED,),
        hands=1,
        loads=1,
        passes=0.3,
    ),
    "parsers": Test(
        title="read the generated text with a second, strict parser",
        outcomes=("agree", "disagree", "no number", NO_ANSWER),
        states=(SAVED,),
        hands=2,
        loads=1,
        passes=1,
    ),
    "settings": Test(
        title="change the temperature and generate again",
        outcomes=("unchanged", "changed", NO_ANSWER),
        pooled=True,
        hands=1,
        loads=1,
        passes=2,
    ),
    "answers": Test(title="ask with the adapter", outcomes=ANSWERED, states=(BASE, SAVED)),
    "effect": Test(
        title="compare the answers with the adapter and without",
        outcomes=("none", "faint", "clear", "not finite"),
        states=(BASE, SAVED),
        hands=3,
        loads=1,
        passes=2,
    ),
    "form": Test(
        title="compare how likely an answer of the form asked for is with the adapter and without",
        outcomes=("likelier", "as the base", "less likely", "not finite"),
        states=(BASE, SAVED),
        hands=3,
        loads=1,
        passes=2,
    ),
    "off": Test(
        title="switch the adapter off and compare with the base",
        outcomes=("is the base", "is not the base"),
        hands=3,
        loads=1,
        passes=0.5,
    ),
    "fingerprint": Test(
        title="compare the base's weights with the published ones, before and after loading",
        outcomes=("as published", "differs", "differs after loading"),
        pooled=True,
        hands=5,
        loads=1,
    ),
    "order": Test(
        title="rank the rows by the log-odds with the adapter, and hold that against the base",
        outcomes=("better", "as the base", "worse", "in reverse", "not finite"),
        states=(BASE, SAVED),
        labels=True,
        hands=5,
        loads=1,
        passes=2,
    ),
    "yes-no": Test(
        title="ask yes or no, and rank by the log-odds",
        outcomes=RANKED,
        states=(SAVED,),
        labels=True,
        hands=5,
        loads=1,
        passes=0.3,
    ),
    "place": Test(
        title="hold its effect against that of its layers moved, and of its weights turned",
        outcomes=("here", "elsewhere", "nowhere", "not finite"),
        states=(BASE, SAVED, SHIFTED, BACK, ROTATED),
        effect=True,
        hands=5,
        loads=1,
        passes=5,
    ),
    "mend": Test(
        title="scale it, flip its sign, move its layers, and see what comes nearer to the truth",
        outcomes=("nothing", "smaller", "larger", "flipped", "moved", "no adapter", "not finite"),
        states=(BASE, SAVED, EIGHTH, EIGHTFOLD, FLIPPED, SHIFTED, BACK),
        effect=True,
        hands=10,
        loads=1,
        passes=7,
    ),
}
# What is run on an adapter at hand. The other tests ask what only an incident's run leaves open:
# its prompts, its parser, its settings, which adapter answered.
OF_ADAPTER = (
    "inspect",
    "base-alone",
    "base-ranks",
    "load",
    "weights",
    "answers",
    "effect",
    "form",
    "off",
    "order",
    "place",
    "mend",
    "markup",
    "reference",
)
# What is run on each replay of an incident, whose own words tell more of what is written.
OF_INCIDENT = tuple(name for name in TESTS if name not in ("answers", "markup"))


def list_experiments(
    tests: Iterable[str], minutes: Mapping[str, float] | None = None
) -> tuple[Experiment, ...]:
    """Tests by name with what each costs in minutes, nothing where left out."""
    costs = minutes or {}
    return tuple(
        Experiment(
            name,
            TESTS[name].title,
            TESTS[name].outcomes,
            minutes=costs.get(name, 0.0),
            pooled=TESTS[name].pooled,
        )
        for name in tests
    )


def price_tests(case: Case) -> dict[str, float]:
    """Minutes of each test on the incident's machine, at the speed that its log shows.

    Without a log only a person's minutes count.
    """
    facts = case.forensics
    load = rows = 0.0
    if facts is not None:
        load = facts.log.loading[1] - facts.log.loading[0]
        rows = facts.log.ticks[-1] - facts.log.ticks[0]
    return {
        name: test.hands + (test.loads * load + test.passes * rows) / 60
        for name, test in TESTS.items()
    }
