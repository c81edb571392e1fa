import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from replays import WORDS, experiment, ledgers, replay, table

from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.beliefs import RELIABILITY, Ledger, Prior
from postmortem.diagnosis.likelihoods import (
    Experiment,
    Hypothesis,
    Likelihoods,
    by_cause,
    measure_likelihoods,
)

CONTROL = experiment("control")
SCAN = experiment("scan", ("a", "b", "c"))
SEPARATED = table(
    [CONTROL, SCAN],
    {
        "no-op": [(1, 9), (9, 1, 0)],
        "sibling": [(9, 1), (0, 9, 1)],
        "healthy": [(9, 1), (0, 1, 9)],
    },
)


def brute_force(ledger):
    """The definition: prior times likelihoods, normalised, hypothesis by hypothesis."""
    table, prior = ledger.likelihoods, ledger.prior
    weights = []
    for row, (cause, base) in enumerate(table.hypotheses):
        on = [h.base for h in table.hypotheses if h.cause == cause]
        weight = prior.causes[cause] * prior.bases[base] / sum(prior.bases[one] for one in on)
        for name, outcome in ledger.observed.items():
            one = table.experiment(name)
            weight *= table.of(name)[row, one.outcomes.index(outcome)]
        weights.append(weight)
    return [weight / sum(weights) for weight in weights]


@given(ledger=ledgers())
def test_posterior_is_prior_times_likelihoods(ledger):
    """The posterior of each hypothesis is its prior times the likelihoods, normalised."""
    assert ledger.weights == pytest.approx(np.array(brute_force(ledger)), abs=1e-12)


@given(ledger=ledgers())
def test_marginals_sum(ledger):
    """Hypotheses, causes and kinds of base each sum to one, and a cause to its hypotheses."""
    posterior = ledger.posterior(draws=20)
    assert posterior.weights.sum() == pytest.approx(1.0)
    assert posterior.samples.sum(axis=1) == pytest.approx(1.0)
    for marginal in (posterior.causes, posterior.bases):
        assert sum(one.value for one in marginal.values()) == pytest.approx(1.0)
    for cause, found in posterior.causes.items():
        own = [h.cause == cause for h in ledger.likelihoods.hypotheses]
        assert found.value == pytest.approx(posterior.weights[own].sum())
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert ledger.marginal(by_cause(ledger.likelihoods))[cause] == found.value


@given(ledger=ledgers(), data=st.data())
def test_order_of_evidence_does_not_matter(ledger, data):
    """Evidence in another order gives the same beliefs, intervals and groups."""
    order = data.draw(st.permutations(list(ledger.observed.items())))
    other = replace(ledger, observed=dict(order))
    assert other.weights == pytest.approx(ledger.weights)
    found, expected = other.posterior(draws=50), ledger.posterior(draws=50)
    assert found.samples == pytest.approx(expected.samples)


@given(ledger=ledgers(), words=st.integers(2, 3), data=st.data())
def test_same_likelihood_for_all_changes_nothing(ledger, words, data):
    """An experiment that all hypotheses answer alike changes no belief and gives zero bits."""
    old = ledger.likelihoods
    row = data.draw(st.lists(st.integers(0, 9), min_size=words, max_size=words))
    counts = np.hstack([old.counts, np.tile(row, (len(old.hypotheses), 1))])
    added = experiment("same", WORDS[:words])
    wider = Likelihoods((*old.experiments, added), old.hypotheses, counts, old.replays)
    before = replace(ledger, likelihoods=wider)
    outcome = data.draw(st.sampled_from(added.outcomes))
    after = replace(before, observed={**ledger.observed, "same": outcome})
    assert after.weights == pytest.approx(ledger.weights)
    last = after.account()[-1]
    assert last.bits == pytest.approx(0.0, abs=1e-9)
    assert all(one is None or one == pytest.approx(0.0, abs=1e-9) for one in last.weights.values())


@given(ledger=ledgers(causes=(2, 4), bases=(1, 1)))
def test_removed_evidence_gives_back_its_likelihood_ratio(ledger):
    """Without one outcome the log odds of two causes differ by exactly its log likelihood ratio."""
    ledger = replace(ledger, prior=Prior())
    logs = np.log(ledger.weights)
    for name, outcome in ledger.observed.items():
        rest = {k: v for k, v in ledger.observed.items() if k != name}
        without = np.log(replace(ledger, observed=rest).weights)
        place = ledger.likelihoods.experiment(name).outcomes.index(outcome)
        own = np.log(ledger.likelihoods.of(name)[:, place])
        change = (logs[0] - logs[1]) - (without[0] - without[1])
        assert change == pytest.approx(own[0] - own[1], abs=1e-9)


@given(ledger=ledgers())
def test_zero_prior_stays_zero(ledger):
    """A cause without prior has no posterior, whatever is observed, and no weight of evidence."""
    causes = ledger.posterior(draws=20).causes
    for cause, weight in ledger.prior.causes.items():
        if weight == 0:
            assert (causes[cause].value, causes[cause].high) == (0.0, 0.0)
            assert all(step.weights[cause] is None for step in ledger.account())
            assert all(cause not in group for group in ledger.not_told_apart(draws=20))


@given(ledger=ledgers())
def test_names_do_not_matter(ledger):
    """Other names of the causes give the same results under those names."""
    new = {cause: f"z{len(ledger.likelihoods.causes) - n}" for n, cause in enumerate("0123")}
    new = {f"c{n}": name for n, name in new.items()}
    old = ledger.likelihoods
    hypotheses = tuple(Hypothesis(new[h.cause], h.base) for h in old.hypotheses)
    prior = Prior({new[c]: w for c, w in ledger.prior.causes.items()}, ledger.prior.bases)
    other = Ledger(replace(old, hypotheses=hypotheses), ledger.observed, prior)
    expected = {new[c]: one for c, one in ledger.posterior(draws=50).causes.items()}
    assert other.posterior(draws=50).causes == expected
    assert other.not_told_apart(draws=50) == tuple(
        tuple(new[cause] for cause in group) for group in ledger.not_told_apart(draws=50)
    )


@given(ledger=ledgers(causes=(2, 4)))
def test_account_adds_up(ledger):
    """Weights of evidence sum to the change of each cause's log odds; bits are not negative."""
    steps = ledger.account()
    assert [(s.experiment, s.outcome) for s in steps] == list(ledger.observed.items())
    assert all(step.bits >= 0 for step in steps)
    labels = by_cause(ledger.likelihoods)
    before = replace(ledger, observed={}).marginal(labels)
    for cause, after in ledger.marginal(labels).items():
        if 1e-9 < before[cause] < 1 - 1e-6 and 1e-9 < after < 1 - 1e-6:
            change = math.log10(after / (1 - after)) - math.log10(
                before[cause] / (1 - before[cause])
            )
            assert sum(s.weights[cause] for s in steps) == pytest.approx(change, abs=1e-6)


def test_weight_of_evidence_speaks_for_and_against():
    """An outcome speaks for the causes that give it often and against those that seldom do."""
    step, yes = Ledger(SEPARATED, {"control": "yes"}).account()[0], SEPARATED.of("control")[:, 1]
    assert step.weights["no-op"] == pytest.approx(math.log10(yes[0] / yes[1]))
    assert step.weights["healthy"] < 0


def test_one_cause_is_certain():
    """With one cause on the list it is certain, and evidence about it cannot be weighed."""
    ledger = Ledger(table([CONTROL], {"a": [(0, 5)]}), {"control": "no"})
    assert ledger.posterior().causes["a"].value == 1.0
    assert ledger.account()[0].weights == {"a": None}
    assert ledger.account()[0].bits == 0.0
    assert ledger.not_told_apart() == (("a",),)


def test_much_evidence_does_not_underflow():
    """Thousands of unlikely outcomes leave beliefs that still sum to one."""
    many = [experiment(f"e{n}") for n in range(3000)]
    rows = {"a": [(0, 50)] * 3000, "b": [(0, 50)] * 2999 + [(50, 0)]}
    ledger = Ledger(table(many, rows), {one.name: "no" for one in many})
    posterior = ledger.posterior(draws=20)
    assert posterior.causes["b"].value == pytest.approx(1 / (1 + 0.5 / 50.5))
    assert np.isfinite(posterior.samples).all()
    assert all(math.isfinite(step.bits) for step in ledger.account())


def test_interval_shrinks_with_replays():
    """The same shares from more replays give the same belief within a narrower interval."""
    widths = []
    for times in (1, 10, 100):
        found = table([CONTROL], {"a": [(2 * times, 6 * times)], "b": [(5 * times, 3 * times)]})
        one = Ledger(found, {"control": "yes"}).posterior().causes["a"]
        assert one.low < one.value < one.high
        assert one.n == found.replays
        widths.append(one.high - one.low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_interval_holds_its_value():
    """A belief far into the tail of a skewed distribution is within its own interval."""
    many = [experiment(f"e{n}") for n in range(30)]
    found = table(many, {"a": [(1, 0)] * 30, "b": [(1, 2)] * 30})
    one = Ledger(found, {e.name: "yes" for e in many}).posterior().causes["a"]
    assert 0 < one.low <= one.value <= one.high


def test_prior_of_a_cause_is_its_own():
    """A cause replayed on one kind of base has the same prior as one replayed on two."""
    replays = [replay("a", control="no"), replay("a", "speaking", control="no")]
    found = measure_likelihoods([*replays, replay("b", control="no")], [CONTROL])
    posterior = Ledger(found, prior=Prior(bases={"silent": 3, "speaking": 1})).posterior()
    assert {c: one.value for c, one in posterior.causes.items()} == pytest.approx(
        {"a": 0.5, "b": 0.5}
    )
    assert posterior.weights == pytest.approx([0.375, 0.125, 0.5])


@pytest.mark.parametrize(
    ("causes", "bases", "message"),
    [
        ({"no-op": math.nan}, None, "prior of the causes: expected finite .* no-op: nan"),
        ({"no-op": math.inf}, None, "finite numbers"),
        ({"no-op": -0.1, "healthy": 1}, None, "finite numbers from 0"),
        ({"no-op": 0.0}, None, "a weight above 0"),
        ({}, None, "a weight above 0"),
        ({"other": 1.0}, None, "a cause of the replays: no-op, sibling, healthy; found 'other'"),
        (None, {"loud": 1.0}, "a base kind of the replays: silent; found 'loud'"),
        (None, {"silent": math.nan}, "the prior of the base kinds"),
    ],
)
def test_prior_that_is_none(causes, bases, message):
    """A prior that is not finite, negative, zero throughout, or of an unknown name is refused."""
    with pytest.raises(DiagnosisError, match=message):
        Ledger(SEPARATED, prior=Prior(causes, bases))


def test_prior_without_a_common_hypothesis():
    """A prior whose cause was replayed only on kinds of base without weight is refused."""
    found = measure_likelihoods(
        [replay("a", control="no"), replay("b", "speaking", control="no")], [CONTROL]
    )
    with pytest.raises(DiagnosisError, match="a kind of base it was replayed on"):
        Ledger(found, prior=Prior({"a": 1}, {"speaking": 1}))


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        ({"dance": "yes"}, "experiment 'dance': expected one of control, scan"),
        ({"control": "perhaps"}, "an outcome among no, yes; found 'perhaps'"),
    ],
)
def test_observation_that_cannot_be(observed, message):
    """An experiment or an outcome that the table does not know is refused at once."""
    with pytest.raises(DiagnosisError, match=message):
        Ledger(SEPARATED, observed)


@given(ledger=ledgers(), trust=st.floats(0, 1))
def test_a_report_takes_no_more_than_it_is_trusted_with(ledger, trust):
    """One report of reliability r leaves each hypothesis at least 1 - r of what it had."""
    prior = np.exp(ledger.log_prior)
    for name, outcome in ledger.observed.items():
        one = replace(ledger, observed={name: outcome}, reliability={name: trust})
        sure = replace(one, reliability={})
        assert one.weights == pytest.approx(trust * sure.weights + (1 - trust) * prior, abs=1e-9)


@given(counts=st.tuples(*[st.integers(0, 30)] * 2), data=st.data())
def test_a_recollection_cannot_outweigh_a_log_line(counts, data):
    """Where a recollection and a log line speak against each other as strongly, the log wins."""
    told, logged = RELIABILITY["recollection"][0], RELIABILITY["log"][0]
    first, second = counts
    rows = {"a": [(first, second), (second, first)], "b": [(second, first), (first, second)]}
    ledger = Ledger(
        table([experiment("memory"), experiment("log")], rows),
        dict.fromkeys(data.draw(st.permutations(["memory", "log"])), "no"),
        reliability={"memory": told, "log": logged},
    )
    # The log's outcome is the likelier under b exactly where the memory's is under a.
    beliefs = ledger.marginal(by_cause(ledger.likelihoods))
    assert (beliefs["b"] - beliefs["a"]) * (first - second) >= -1e-12


def test_what_never_happens_under_a_cause_nearly_refutes_it():
    """A cause whose every replay raises has next to nothing after a log of a silent load."""
    load = Experiment("load", "Load", ("silent", "raises"), 1.0, pooled=True)
    replays = [replay("misfit", seed=n, load="raises") for n in range(4)]
    replays += [replay(f"c{n}", seed=seed, load="silent") for n in range(9) for seed in range(4)]
    found = measure_likelihoods(replays, [load])
    ledger = Ledger(found, {"load": "silent"}, reliability={"load": RELIABILITY["log"][0]})
    assert found.of("load")[0, 0] < 0.02
    assert ledger.posterior().causes["misfit"].value < 0.01


def test_observed_evidence_tells_apart_or_does_not():
    """Causes alike on what was observed are one group; what was not observed does not part them."""
    one = Ledger(SEPARATED, {"control": "no"}).not_told_apart()
    assert one == (("sibling", "healthy"), ("no-op",))
    two = Ledger(SEPARATED, {"control": "no", "scan": "b"}).not_told_apart()
    assert two[0] == ("sibling",)
    assert Ledger(SEPARATED).not_told_apart() == (("no-op", "sibling", "healthy"),)


def test_small_factor_is_not_apart_however_sure():
    """Causes whose Bayes factor is surely 2 are not told apart; at 4 they are."""
    rows = {"a": [(60_000, 40_000)], "b": [(80_000, 20_000)], "c": [(90_000, 10_000)]}
    groups = Ledger(table([CONTROL], rows), {"control": "yes"}).not_told_apart()
    assert groups == (("a",), ("b", "c"))


def test_large_factor_of_few_replays_is_not_apart():
    """A large Bayes factor from one replay each does not tell causes apart; from 50 it does."""
    two = [CONTROL, experiment("two")]
    for times, groups in ((1, (("b", "a"),)), (50, (("b",), ("a",)))):
        found = table(two, {"a": [(times, 0)] * 2, "b": [(0, times)] * 2})
        ledger = Ledger(found, {"control": "yes", "two": "yes"})
        assert ledger.account()[0].weights["b"] > 0.4
        assert ledger.not_told_apart() == groups


def test_chain_of_neighbours_is_not_one_group():
    """Causes whose likelihood falls step by step are not all one group."""
    rows = {f"c{n}": [(100 - 24 * n, 24 * n)] for n in range(5)}
    rows = {cause: [(10 * a, 10 * b) for a, b in row] for cause, row in rows.items()}
    groups = Ledger(table([CONTROL], rows), {"control": "yes"}).not_told_apart()
    assert len(groups) > 1
    assert groups[0][0] == "c4"
    assert all("c0" not in group for group in groups[:-1])


@given(ledger=ledgers())
def test_groups_of_observed_part_the_causes(ledger):
    """Each cause with a prior is in exactly one group."""
    groups = ledger.not_told_apart(draws=20)
    possible = [cause for cause, weight in ledger.prior.causes.items() if weight > 0]
    assert sorted(cause for group in groups for cause in group) == sorted(possible)
