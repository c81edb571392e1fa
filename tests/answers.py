"""Answers made by hand: values and log-odds without a model."""

from postmortem.experiments.records import Prediction
from postmortem.experiments.session import Answers


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
    return Answers("base", "v2", "number", predictions, None, None)
