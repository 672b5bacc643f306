"""What the mathematics promises (test_recurrent_promises.py), of the Triton kernels under Triton's interpreter."""

import pytest
import test_recurrent_promises as promises
from triton_support import needs_interpreter

pytestmark = [needs_interpreter, promises.pytestmark]


ROLES = ["sequence", "step", "persistent"]


@pytest.fixture(autouse=True, params=ROLES)
def role(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    from fastseq.kernels.recurrent import launch as recurrent_launch

    monkeypatch.setattr(recurrent_launch, "role", request.param)
    return request.param


@pytest.mark.full
def test_for_a_thousand_steps(backend: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "LONG", 1000)
    dtype = promises.DTYPES[ROLES.index(role)]  # one each: every role has every dtype over fewer steps
    promises.test_open_forget_gate_carries_the_cell_for_thousands_of_steps(backend, dtype)


globals().update({name: test for name, test in vars(promises).items() if name.startswith("test_")})
