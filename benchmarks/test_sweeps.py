"""The growing cost of kd_loss and its peers with V and with N, forward and backward together.

pytest benchmarks/test_sweeps.py --benchmark-columns=median,iqr --benchmark-group-by=group
"""

from fused_kd.testing import shapes

from .conftest import DEVICE, DTYPE, cases


@cases(shapes.sweep_shapes(DEVICE, DTYPE), passes=("both",))
def test_step(time_case, case):
    time_case(case)
