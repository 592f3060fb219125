"""The head from a student's embedding into the teacher's space."""

from __future__ import annotations

import pytest
import torch

from ckd.losses import CosineDistillationLoss, MSEDistillationLoss, TeacherSpaceHead


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_shapes_state_and_the_way_back(kind: str) -> None:
    mean = torch.linspace(-2, 5, 12, dtype=torch.float64)
    head = TeacherSpaceHead(8, 12, kind, mean=mean, sigma=0.25)
    student, teacher = torch.randn(5, 8), torch.randn(5, 12).half()
    h = head(student)
    assert h.shape == (5, 12)
    expected = (teacher.double() - mean) / 0.25
    torch.testing.assert_close(head.standardize(teacher).double(), expected, rtol=1e-6, atol=1e-5)
    back = head.to_teacher(head.standardize(teacher))
    torch.testing.assert_close(back, teacher.float(), rtol=1e-6, atol=1e-6)
    other = TeacherSpaceHead(8, 12, kind)
    other.load_state_dict(head.state_dict())  # the map is whole: mean and sigma are part of it
    assert torch.equal(other.to_teacher(other(student)), head.to_teacher(h))
    assert {"mean", "sigma"} <= head.state_dict().keys()


def test_the_mlp_is_as_wide_as_the_wider_side_and_does_not_see_the_scale_of_its_input() -> None:
    widths = [TeacherSpaceHead(w, d, "mlp").net[0].out_features for w, d in ((8, 12), (9, 4))]
    assert widths == [12, 9]
    assert TeacherSpaceHead(8, 12, "mlp", hidden=3).net[0].out_features == 3
    head = TeacherSpaceHead(8, 12, "mlp")
    torch.nn.init.zeros_(head.net[0].bias)
    student = torch.randn(5, 8)
    torch.testing.assert_close(head(100 * student), head(student), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("loss", [CosineDistillationLoss(), MSEDistillationLoss()])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_learns_a_teacher_that_is_an_affine_map(loss: torch.nn.Module, kind: str) -> None:
    torch.manual_seed(0)
    student = torch.randn(64, 8)
    teacher = 100 + 7 * student @ torch.randn(8, 12)
    variance = teacher.var(dim=0, correction=0)
    head = TeacherSpaceHead(8, 12, kind, mean=teacher.mean(0), sigma=variance.mean().sqrt().item())
    assert head.standardize(teacher).square().mean().item() == pytest.approx(1, rel=1e-3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        value = loss(head(student), head.standardize(teacher))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() < 0.03
    if isinstance(loss, MSEDistillationLoss):
        assert (head.to_teacher(head(student)) - teacher).std() < 0.2 * teacher.std()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "conv"}, "unknown kind of head 'conv'; known, nearest first: "),
        ({"student_dim": 0}, "must be at least 1, got 0, 12 and 12"),
        ({"kind": "mlp", "hidden": 0}, "must be at least 1, got 8, 12 and 0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0; it is 0 where all rows"),
        ({"sigma": float("nan")}, "sigma must be positive"),
        ({"mean": torch.zeros(8)}, r"mean must be finite, \[12\], got \[8\]"),
        ({"mean": torch.full((12,), torch.nan)}, "mean must be finite"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TeacherSpaceHead(**{"student_dim": 8, "teacher_dim": 12, **settings})
