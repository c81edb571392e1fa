"""Replays and likelihood tables made by hand, and strategies that draw them."""

import numpy as np
from hypothesis import strategies as st

from postmortem.diagnosis.beliefs import Ledger, Prior
from postmortem.diagnosis.likelihoods import Experiment, Hypothesis, Likelihoods
from postmortem.experiments.records import Replay

WORDS = ("low", "middle", "high")
WEIGHTS = st.integers(0, 5) | st.floats(0, 1e6, allow_subnormal=False)


def replay(cause, base="silent", *, seed=0, severity="-", **outcomes):
    """One replay; its key says what it is."""
    return Replay(
        key=f"{cause}/{base}/{seed}/{severity}",
        cause=cause,
        base=base,
        seed=seed,
        severity=severity,
        outcomes=outcomes,
        features={},
    )


def experiment(name, outcomes=("no", "yes"), minutes=1.0):
    """An experiment titled like its name."""
    return Experiment(name, name.title(), tuple(outcomes), minutes)


def table(experiments, counts):
    """A table of one kind of base: counts by cause, a tuple of outcome counts per experiment."""
    hypotheses = tuple(Hypothesis(cause, "silent") for cause in counts)
    rows = [[n for each in row for n in each] for row in counts.values()]
    total = sum(sum(row[0]) for row in counts.values())
    return Likelihoods(tuple(experiments), hypotheses, np.array(rows, dtype=float), int(total))


@st.composite
def tables(draw, *, causes=(1, 4), bases=(1, 2)):
    """A table with any counts; some causes were not replayed on some kinds of base."""
    kinds = ("silent", "speaking")[: draw(st.integers(*bases))]
    hypotheses = []
    for cause in range(draw(st.integers(*causes))):
        on = draw(st.lists(st.sampled_from(kinds), min_size=1, unique=True))
        hypotheses += [Hypothesis(f"c{cause}", base) for base in on]
    sizes = draw(st.lists(st.integers(2, 3), min_size=1, max_size=4))
    minutes = st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0])
    experiments = [experiment(f"e{n}", WORDS[:k], draw(minutes)) for n, k in enumerate(sizes)]
    row = st.lists(st.integers(0, 8), min_size=sum(sizes), max_size=sum(sizes))
    counts = np.array([draw(row) for _ in hypotheses], dtype=float)
    return Likelihoods(tuple(experiments), tuple(hypotheses), counts, int(counts.sum()))


@st.composite
def observations(draw, likelihoods):
    """Outcomes of some of a table's experiments, in any order."""
    chosen = draw(st.lists(st.sampled_from(likelihoods.experiments), unique=True))
    return {one.name: draw(st.sampled_from(one.outcomes)) for one in chosen}


@st.composite
def ledgers(draw, causes=(1, 4), bases=(1, 2)):
    """A ledger with any prior and any outcomes."""
    likelihoods = draw(tables(causes=causes, bases=bases))
    names = likelihoods.causes
    weights = {name: draw(WEIGHTS) for name in names}
    weights[draw(st.sampled_from(names))] = 1.0
    kinds = {name: draw(st.floats(0.1, 10)) for name in likelihoods.bases}
    return Ledger(likelihoods, draw(observations(likelihoods)), Prior(weights, kinds))
