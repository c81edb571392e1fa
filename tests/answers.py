"""Answers made by hand: values and log-odds without a model."""

import numpy as np

from postmortem.experiments.ask import Answers
from postmortem.experiments.records import Prediction


def answers_of(values, log_odds, labels):
    """Answers that wrote these values and had these log-odds."""
    predictions = tuple(
        Prediction(
            system="base",
            prompt="v2",
            row_id=str(i),
            group="g",
            label=labels and labels[i],
            text=str(value),
            token_ids=(1,),
            prompt_tokens=1,
            full_prompt_tokens=1,
            finished=True,
            value=value,
            stage="float",
            strict_value=value,
            expected_value=0.5,
            number_log_odds=log_odds[i],
            yes_no_log_odds=0.0,
        )
        for i, value in enumerate(values)
    )
    rows = len(values)
    first, numbers = np.full((rows, 5), np.log(0.2)), np.full((rows, 11), np.log(1 / 11))
    return Answers("base", "v2", "number", predictions, first, numbers)
