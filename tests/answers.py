"""Answers made by hand, with the provenance of a run that never was: no model is asked."""

import numpy as np

from postmortem.experiments.ask import Answers
from postmortem.experiments.records import Prediction, Provenance

PROVENANCE = Provenance(
    notebook="attempt",
    case="qwen-lora",
    profile="smollm2",
    parameters={"rows": 6, "fast": True, "share": 1.0, "data": "", "labels": None},
    digests={"case": "c0", "module parsing": "p0"},
    versions={"python": "3.11.0"},
    device="cpu",
    dtype="float32",
    seed=0,
    aside={
        "started": "2026-01-01 10:00 UTC",
        "seconds": 60.5,
        "hardware": "a card",
        "commit": "0123456789ab",
    },
)


def prediction(**changes):
    """What the base answered to one row."""
    parts = {"system": "base", "prompt": "v2", "row_id": "1", "group": "g", "label": 1}
    parts |= {"text": "0.0", "token_ids": (1,), "prompt_tokens": 9, "full_prompt_tokens": 9}
    parts |= {"finished": True, "value": 0.0, "stage": "float", "strict_value": 0.0}
    parts |= {"expected_value": 0.5, "number_log_odds": -2.0, "yes_no_log_odds": 0.5}
    return Prediction(**(parts | changes))


def answers_of(values, log_odds, labels):
    """Answers that wrote these values and had these log-odds."""
    predictions = tuple(
        prediction(
            row_id=str(i),
            label=labels and labels[i],
            text=str(value),
            value=value,
            strict_value=value,
            number_log_odds=log_odds[i],
        )
        for i, value in enumerate(values)
    )
    rows = len(values)
    first, numbers = np.full((rows, 5), np.log(0.2)), np.full((rows, 11), np.log(1 / 11))
    pair = np.full((rows, 2), np.log(0.5))
    return Answers("base", "v2", "number", predictions, first, numbers, pair)
