"""Prototypes and losses in hand-computed cases (Eq. 1, 2 and 6), and the model's own behaviour."""

import math
from pathlib import Path

import pytest
import torch

from de3.training import loss as losses
from de3.training.model import De3Model


@pytest.fixture
def model(encoder: Path) -> De3Model:
    return De3Model.from_encoder(str(encoder), ["a", "b", "c"], exit_layers=[0, 1, 2, 3], metric_dim=2)


def test_prototypes_slide_as_in_equation_1(model: De3Model) -> None:
    model.config.gamma = 0.25
    first = torch.tensor([[1.0, 0.0], [3.0, 2.0], [10.0, 10.0]], requires_grad=True)[:, None].expand(3, 3, 2)
    model.update_prototypes(first, torch.tensor([0, 0, 1]))
    assert not model.prototypes.requires_grad
    # The first mean initializes a prototype; class c did not occur.
    assert model.prototypes[0].tolist() == [[2.0, 1.0], [10.0, 10.0], [0.0, 0.0]]
    assert model.prototype_seen[0].tolist() == [True, True, False]
    model.update_prototypes(first[:1] + 5, torch.tensor([0]))
    # 0.75·(2, 1) + 0.25·(6, 5); class b did not occur, and keeps its prototype.
    assert model.prototypes[2].tolist() == [[3.0, 2.0], [10.0, 10.0], [0.0, 0.0]]


def test_dar_is_the_mean_cosine_distance_to_the_true_class(model: De3Model) -> None:
    model.prototypes[0] = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    embedded = torch.tensor([[3.0, 0.0], [1.0, 1.0]])[:, None].expand(2, 3, 2)
    distances = model.distances(embedded)
    assert distances[0, 0].tolist() == pytest.approx([0, 1, 2])
    expected = (0 + (1 - 1 / math.sqrt(2))) / 2
    assert losses.dar(distances, torch.tensor([0, 1]))[0] == pytest.approx(expected)


def test_layer_weights() -> None:
    assert losses.layer_weights([1, 2, 3], "depth").tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert losses.layer_weights([0, 1, 3], "depth").tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert losses.layer_weights([0, 1], "uniform").tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="depth or uniform"):
        losses.layer_weights([1], "width")


def test_total_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]])  # CE for label 1: ln 2, ln 4/3
    distances = torch.tensor([[[1.5, 0.4]]])
    weights = torch.tensor([0.25, 0.75])
    total = losses.total(logits, distances, torch.tensor([1]), weights, alpha=0.1)
    assert total == pytest.approx(0.25 * (math.log(2) + 0.1 * 0.4) + 0.75 * math.log(4 / 3))
    teacher = torch.tensor([[0.0, 2.0]])
    taught = losses.total(logits, distances, torch.tensor([1]), weights, 0.0, teacher, 0.3, 2.0)
    own = torch.tensor([math.log(2), math.log(4 / 3)])
    expected = (weights * (0.7 * own + 0.3 * losses.distillation(logits, teacher, 2.0))).sum()
    assert taught == pytest.approx(float(expected))


def test_distillation_is_0_for_a_perfect_student_and_scales_with_t_squared() -> None:
    teacher = torch.tensor([[1.0, -1.0]])
    assert losses.distillation(teacher[:, None], teacher, 2.0).tolist() == pytest.approx([0.0], abs=1e-7)
    student = torch.tensor([[[0.0, 0.0]]])
    p = torch.softmax(teacher / 2, -1)
    expected = 4 * (p * (p / 0.5).log()).sum()
    assert losses.distillation(student, teacher, 2.0)[0] == pytest.approx(float(expected))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_an_answer(encoder: Path, pooling: str) -> None:
    model = De3Model.from_encoder(str(encoder), ["a", "b"], pooling=pooling).eval()
    model.prototypes.normal_()
    ids = torch.tensor([[2, 9, 14, 3]])
    alone = model(ids, torch.ones_like(ids))
    padded = model(
        torch.tensor([[2, 9, 14, 3, 0, 0], [2, 5, 6, 7, 8, 3]]),
        torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
    )
    assert torch.allclose(alone.logits[0], padded.logits[0], atol=1e-5)
    assert torch.allclose(alone.distances[0], padded.distances[0], atol=1e-5)


def test_a_saved_model_loads_the_hugging_face_way(model: De3Model, tmp_path: Path) -> None:
    from transformers import AutoModel

    model.prototypes.normal_()
    model.prototype_seen.fill_(True)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, De3Model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_pretrained_encoder_keeps_its_weights(encoder: Path) -> None:
    from transformers import AutoModel

    original = AutoModel.from_pretrained(encoder).state_dict()
    ours = De3Model.from_encoder(str(encoder), ["a", "b"]).encoder.state_dict()
    assert ours and all(torch.equal(v, original[k]) for k, v in ours.items())


def test_exit_layers_that_make_no_sense_are_refused(encoder: Path) -> None:
    for exits in ([1, 2], [2, 1, 3], [-1, 3], [0, 1, 2, 3, 4], []):
        with pytest.raises(ValueError, match="exit_layers must"):
            De3Model.from_encoder(str(encoder), ["a", "b"], exit_layers=exits)


def test_prototypes_as_means_are_those_of_every_sample(model: De3Model) -> None:
    from de3.training import prototypes
    from de3.training.encoded import Encoded

    data = Encoded([[2, 5, 3], [2, 6, 7, 3], [2, 8, 3]], [], torch.tensor([0, 2, 0]))
    prototypes.finish(model, data, 0, "means", lr=1e-3, seed=0, bf16=False)
    embedded = torch.stack([model(**data.batch([i], 0)[0]).embedded[0] for i in range(3)])
    assert torch.allclose(model.prototypes[:, 0], embedded[[0, 2]].mean(0), atol=1e-5)
    assert torch.allclose(model.prototypes[:, 2], embedded[1], atol=1e-5)
    assert model.prototype_seen[0].tolist() == [True, False, True]


def test_refitting_leaves_the_classifier_alone_and_sliding_everything(model: De3Model) -> None:
    from de3.training import prototypes
    from de3.training.encoded import Encoded

    data = Encoded([[2, 5, 3], [2, 6, 7, 3]] * 40, [], torch.tensor([0, 1] * 40))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prototypes.finish(model, data, 0, "sliding", lr=1e-3, seed=0, bf16=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    prototypes.finish(model, data, 0, "refit", lr=1e-3, seed=0, bf16=False)
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"prototypical", "prototypes", "prototype_seen"}
