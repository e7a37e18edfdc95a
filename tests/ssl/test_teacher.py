"""The moving average."""

import torch
from torch import nn

from pathfm.ssl.teacher import follow, start_as_copy


def test_the_teacher_starts_as_a_copy_without_gradients_in_evaluation_mode() -> None:
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    start_as_copy(teacher, student)
    assert torch.equal(teacher.weight, student.weight)
    assert teacher.weight is not student.weight
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


def test_the_teacher_is_the_moving_average_of_the_student() -> None:
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = 0.9 * teacher.weight + 0.1 * student.weight
    follow(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, expected)


def test_momentum_one_leaves_the_teacher_bit_for_bit() -> None:
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    before = teacher.weight.clone()
    follow(teacher, student, 1.0)
    assert torch.equal(teacher.weight, before)
