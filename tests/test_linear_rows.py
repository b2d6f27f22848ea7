"""Rows that do not count in linear_kd_loss."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import linear_kd_loss

from .heads import CHUNKED, F_S, F_T, N, V, make, run
from .oracle import relative_error
from .unread import unread

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("looked_at", [True, False])  # False: as on a GPU, where nobody looks at the labels
def test_an_ignored_row_may_hold_anything(device, reduction, looked_at):
    given = make(device, shape=(2, 5))
    given.labels[0, 1] = given.labels[1, 4] = -100
    options = {"reduction": reduction, "workspace_bytes": CHUNKED}
    clean = run(linear_kd_loss, given, **options)
    with torch.no_grad():
        given.hidden[0, 1] = given.teacher_hidden[0, 1] = torch.nan
        given.hidden[1, 4] = torch.inf
    if not looked_at:
        given = given._replace(labels=unread(given.labels))
    dirty = run(linear_kd_loss, given, **options)
    assert not dirty["hidden"][0, 1].any()
    for name in clean:
        assert relative_error(dirty[name], clean[name].double()) < 1e-6, name


def test_ignored_rows_are_not_projected_on_the_cpu():
    given = make("cpu")
    given.labels[:3] = -100
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5]).backward()
    assert counter.get_total_flops() * N == (3 * F_S + F_T) * (N - 3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(N,), (0,), (2, 0)])
def test_no_row_counts(device, reduction, shape):
    given = make(device, shape=shape)
    given.labels.fill_(-100)
    for name, result in run(linear_kd_loss, given, reduction=reduction).items():
        assert not result.any(), name
        assert not result.isnan().any(), name
    assert given.hidden.grad.shape == given.hidden.shape


def test_a_label_that_cannot_be_raised_gives_nan():
    given = make("cpu")
    given.labels[1] = V
    given = given._replace(labels=unread(given.labels))
    losses = linear_kd_loss(*given[:5], reduction="none")
    assert losses.isnan().tolist() == [False, True, *[False] * (N - 2)]
    assert linear_kd_loss(*given[:5]).isnan()


@pytest.mark.parametrize("way", [{"compact": True}, {"compact": False}, {"counted_rows": N - 2}])
def test_only_the_row_of_a_wrong_label_is_nan_where_rows_are_left_out(way):
    given = make("cpu")
    given.labels[[3, 5]], given.labels[7] = -100, V
    given = given._replace(labels=unread(given.labels))
    losses = linear_kd_loss(*given[:5], reduction="none", **way)
    assert losses.isnan().nonzero().tolist() == [[7]]
    assert not losses[[3, 5]].any()
