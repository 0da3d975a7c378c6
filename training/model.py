"""The DE3-BERT model: a Hugging Face encoder with a classifier and a prototype space at every exit.

It is saved and loaded like any Hugging Face model (config.json, model.safetensors).
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

POOLINGS = ("mean", "cls")


class De3Config(PretrainedConfig):
    """The configuration of a DE3-BERT, including its encoder's configuration.

    Raises ValueError if `exit_layers` or `pooling` is invalid.

    Args:
        encoder: the encoder's configuration as a dict, with its `model_type`. Default: BERT's.
        exit_layers: layers that have a classifier, ascending; 0 is the embedding output and the last must
            be the encoder's depth M. Default: 1…M.
        pooling: pooling of a layer's states to h^(m): "mean", over the sample's tokens, or "cls", the first token's.
        metric_dim: width of the prototype space; default: the encoder's hidden size.
        last_prototypes: give the last layer a prototype space too, for drift monitoring and experiments.
        gamma: γ of Eq. 1, the moving-average factor of the prototypes.
        thresholds: in a multi-label model, the probability above which each label is assigned. Such a model has no
            prototypes. None: not a multi-label model.
        max_tokens: maximum input length of the encoder.
        input: kind of input in training, "text" or "pair"; None: unknown.
    """

    model_type = "de3-bert"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        exit_layers: list[int] | None = None,
        pooling: str = "mean",
        metric_dim: int | None = None,
        last_prototypes: bool = False,
        thresholds: list[float] | None = None,
        gamma: float = 0.01,
        max_tokens: int = 512,
        input: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder = encoder or AutoConfig.for_model("bert").to_dict()
        settings = self.encoder_config()
        self.num_layers = int(settings.num_hidden_layers)
        self.hidden_size = int(settings.hidden_size)
        self.exit_layers = list(range(1, self.num_layers + 1)) if exit_layers is None else list(exit_layers)
        self.pooling = pooling
        self.metric_dim = metric_dim or self.hidden_size
        self.last_prototypes = last_prototypes
        self.thresholds = thresholds
        self.gamma = gamma
        self.max_tokens = max_tokens
        self.input = input
        if self.exit_layers != sorted(set(self.exit_layers)) or self.exit_layers[:1] < [0]:
            raise ValueError(f"exit_layers must ascend from 0 or more, got {self.exit_layers}")
        if self.exit_layers[-1:] != [self.num_layers]:
            raise ValueError(f"exit_layers must end at the last layer, {self.num_layers}: {self.exit_layers}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        super().__init__(**kwargs)

    def encoder_config(self) -> PretrainedConfig:
        """The encoder's configuration as its own class."""
        return AutoConfig.for_model(**self.encoder)

    @property
    def label_names(self) -> list[str]:
        """The label names in the order of the logits."""
        return [self.id2label[k] for k in range(self.num_labels)]

    @property
    def prototype_layers(self) -> list[int]:
        """Layers of the exits with a prototype space: all exits but the last, or all with `last_prototypes`.

        Empty for multi-label models.
        """
        if self.thresholds is not None:
            return []
        return self.exit_layers if self.last_prototypes else self.exit_layers[:-1]


@dataclass
class De3Output:
    """The outputs of a forward pass: exits in the order of `exit_layers`, spaces in the order of `prototype_layers`.

    Attributes:
        logits: (batch, exits, num_labels).
        embedded: h'^(m), the pooled states in the prototype spaces, (batch, spaces, metric_dim).
        distances: cosine distances to the prototypes, (batch, spaces, num_labels), in [0, 2].
    """

    logits: Tensor
    embedded: Tensor
    distances: Tensor


class De3Model(PreTrainedModel):
    """An encoder with a classifier at every exit and a prototypical network at the exits of `prototype_layers`."""

    config_class = De3Config
    base_model_prefix = "encoder"
    _supports_sdpa = True

    prototypes: Tensor  # (spaces, num_labels, metric_dim)
    prototype_seen: Tensor  # (spaces, num_labels), bool: a class without samples has no prototype

    def __init__(self, config: De3Config) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config())
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # every exit does its own pooling
        width, labels, spaces = config.hidden_size, config.num_labels, len(config.prototype_layers)
        self.dropout = nn.Dropout(getattr(config.encoder_config(), "hidden_dropout_prob", 0.1))
        self.classifiers = nn.ModuleList(nn.Linear(width, labels) for _ in config.exit_layers)
        self.prototypical = nn.ModuleList(nn.Linear(width, config.metric_dim) for _ in range(spaces))
        self.register_buffer("prototypes", torch.zeros(spaces, labels, config.metric_dim))
        self.register_buffer("prototype_seen", torch.zeros(spaces, labels, dtype=torch.bool))
        self.post_init()

    @classmethod
    def from_encoder(cls, name: str, labels: list[str], **settings: Any) -> Self:
        """A new model with untrained heads on a pretrained encoder from a folder or the hub.

        settings: further arguments of De3Config. Raises ValueError if weights of the encoder are missing or
        have the wrong shape, or if the settings are invalid.
        """
        # Weights of the wrong shape are only reported here, and rejected below.
        encoder, loaded = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        check_loaded(loaded, name, optional="pooler.")
        config = De3Config(
            encoder=encoder.config.to_dict(),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            **settings,
        )
        model = cls(config)
        weights = {k: v for k, v in encoder.state_dict().items() if not k.startswith("pooler.")}
        model.encoder.load_state_dict(weights)
        return model

    @torch.no_grad()
    def start_at(self, labels: Tensor) -> None:
        """Initialize the biases of a multi-label model's exits to the labels' log-odds; labels: (n, num_labels) bool.

        Starting from probabilities of 0.5, training would spend hundreds of steps learning that most labels are rare.
        """
        frequencies = (labels.sum(0) + 0.5) / (len(labels) + 1)
        for classifier in self.classifiers:
            classifier.get_parameter("bias").copy_(torch.logit(frequencies))

    def pool(self, hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
        """h^(m), (batch, hidden), pooled from hidden states (batch, tokens, hidden) with their mask (batch, tokens)."""
        if pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> De3Output:
        """The outputs of all exits for a padded batch; each input is (batch, tokens)."""
        pooled = self.pooled(input_ids, attention_mask, token_type_ids)
        # The heads run in float32: they cost little, and a prototype distance is a difference of nearly
        # equal numbers.
        with torch.autocast(input_ids.device.type, enabled=False):
            logits = [f(self.dropout(pooled[:, i])) for i, f in enumerate(self.classifiers)]
            embedded = self.embed(pooled)
            return De3Output(torch.stack(logits, 1), embedded, self.distances(embedded))

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """h^(m) of every exit, (batch, exits, hidden), in float32."""
        states = self.states(input_ids, attention_mask, token_type_ids)
        return torch.stack([self.pool(x, attention_mask, self.config.pooling) for x in states], 1)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> list[Tensor]:
        """The hidden states of every exit's layer as the exit sees them, each (batch, tokens, hidden), in float32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        # Some tokenizers return token types for encoders that have none.
        if token_type_ids is not None and getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = token_type_ids
        output = self.encoder(**inputs, output_hidden_states=True)
        *states, last = [output.hidden_states[m].float() for m in self.config.exit_layers]
        # A pre-norm encoder normalizes only its last states, not those between layers.
        if (final_norm := getattr(self.encoder, "final_norm", None)) is not None:
            states, last = [final_norm(x) for x in states], output.last_hidden_state.float()
        return [*states, last]

    def embed(self, pooled: Tensor) -> Tensor:
        """h'^(m), (batch, spaces, metric_dim), of h^(m), (batch, exits, hidden). Exits without a space are ignored."""
        if not self.prototypical:
            return pooled.new_zeros(len(pooled), 0, self.config.metric_dim)
        return torch.stack([f(pooled[:, i]) for i, f in enumerate(self.prototypical)], 1)

    def distances(self, embedded: Tensor) -> Tensor:
        """Cosine distances 1 − cos, (batch, spaces, num_labels), of h' (batch, spaces, metric_dim)."""
        unit = F.normalize(embedded, dim=-1)
        return 1 - torch.einsum("bsd,skd->bsk", unit, F.normalize(self.prototypes, dim=-1))

    @torch.no_grad()
    def update_prototypes(self, embedded: Tensor, labels: Tensor) -> None:
        """One moving-average step: cp_k ← (1−γ)·cp_k + γ·mean of the batch's h' with label k (Eq. 1).

        A class that is not in the batch keeps its prototype. A class seen for the first time starts at its
        mean. No gradient flows through the prototypes. embedded: (batch, spaces, metric_dim); labels: (batch,).
        """
        for k in labels.unique().tolist():
            mean = embedded[labels == k].mean(0)
            moved = (1 - self.config.gamma) * self.prototypes[:, k] + self.config.gamma * mean
            self.prototypes[:, k] = torch.where(self.prototype_seen[:, k, None], moved, mean)
            self.prototype_seen[:, k] = True


def check_loaded(loaded: dict[str, Any], name: str, optional: str | None = None) -> None:
    """Raise ValueError unless every weight came from the file: a missing or misshapen weight would be random.

    loaded: the report of from_pretrained. optional: prefix of names that may be missing; None: no name may be missing.
    """
    missing = [key for key in loaded["missing_keys"] if optional is None or not key.startswith(optional)]
    wrong = [*missing, *(str(item[0]) for item in loaded.get("mismatched_keys", ()))]
    if wrong:
        raise ValueError(
            f"{name}: its file lacks {len(wrong)} of the model's weights, or has them in another shape: "
            f"{', '.join(sorted(wrong)[:3])}{' …' if len(wrong) > 3 else ''}"
        )


AutoConfig.register("de3-bert", De3Config)
AutoModel.register(De3Config, De3Model)
