"""The families of encoders, one file each, with one interface (weights.Family). No other code depends on a family.

Import and export need them. Training does not, because every encoder of transformers returns its hidden states
(training/model.py applies an encoder's final norm to those before the last layer).
"""

from typing import Any

from de3.training.encoders.bert import BERT, ELECTRA, ROBERTA
from de3.training.encoders.deberta import DEBERTA
from de3.training.encoders.distilbert import DISTILBERT
from de3.training.encoders.modernbert import MODERNBERT
from de3.training.encoders.mpnet import MPNET
from de3.training.encoders.weights import Family

FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "mpnet": MPNET,
    "deberta-v2": DEBERTA,  # and v3, whose checkpoints have the type deberta-v2
    "modernbert": MODERNBERT,
}


def family(config: Any) -> Family:
    """The family of an encoder by its configuration; raises ValueError for one that cannot be exported."""
    known = FAMILIES.get(config.model_type)
    if known is None:
        raise ValueError(
            f"encoders of type {config.model_type!r} cannot be exported; supported: {', '.join(FAMILIES)}"
        )
    known.check(config)
    return known
