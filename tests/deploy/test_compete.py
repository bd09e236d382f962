"""compete by a clock of the test's own: order, margin, noise, rejected entrants, and what the report says."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dspfx.config import Inputs
from dspfx.deploy import compete as module
from dspfx.deploy import timing
from dspfx.deploy.compete import AGAIN, MARGIN, MAX_ROUNDS, ROUNDS, Contest, Entrant, choose, compete
from dspfx.deploy.timing import Result
from dspfx.errors import InputError, MismatchError, RuntimeBuildError

IMAGE = Inputs(torch.zeros(2, 3, 8, 8))


class Clock:
    """Time that passes only in the calls of its networks."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def entrant(self, name: str, seconds: Callable[[int], float] | float, expected: float | None = None) -> Entrant:
        """A network whose n-th call takes `seconds(n)`."""
        clock = self
        cost = seconds if callable(seconds) else lambda _: float(seconds)

        class Timed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.count = 0

            def forward(self, x: Tensor) -> Tensor:
                if not isinstance(x, torch._subclasses.FakeTensor):
                    assert torch.is_inference_mode_enabled()
                    clock.now += cost(self.count)
                    clock.calls.append(name)
                    self.count += 1
                return x

        return Entrant(name, Timed, expected)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: found.now)
    return found


class Odd(nn.ReLU):
    """What the test's runtime rejects, and for this reason."""

    def __init__(self, why: Exception) -> None:
        super().__init__()
        self.why = why


def test_the_fastest_wins(clock: Clock) -> None:
    entrants = [clock.entrant("dense", 1.0), clock.entrant("small", 0.8), clock.entrant("branches", 0.5)]
    network, contest = compete("eager", entrants, IMAGE)
    assert contest.winner == "branches"
    assert contest.results == {
        "dense": Result(1000.0, 1.0, 0.0),
        "small": Result(pytest.approx(800.0), pytest.approx(0.8), pytest.approx(0.0)),  # type: ignore[arg-type]
        "branches": Result(500.0, 0.5, 0.0),
    }
    assert contest.ratio == 0.5
    assert (contest.is_noisy, contest.notes, contest.expected_ms) == (False, (), {})
    clock.calls.clear()
    with torch.inference_mode():
        network(*IMAGE.args)
    assert clock.calls == ["branches"]


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ((1.0, 1.0, 1.0), "a"),
        ((1.0, 1.0 - MARGIN + 1e-6, 1.0), "a"),
        ((1.0, 1.0 - MARGIN - 1e-6, 1.0), "b"),
        ((1.0, 0.9, 0.9), "b"),
        ((1.0, 0.9, 0.9 * (1 - MARGIN) + 1e-6), "b"),  # the fastest, but not by enough to be worth its risk
        ((1.0, 0.9, 0.9 * (1 - MARGIN) - 1e-6), "c"),
        ((1.0, 0.98, 0.96), "c"),  # against the best before it that was accepted
        ((0.5, 0.9, 0.8), "a"),
    ],
)
def test_who_is_riskier_has_to_be_faster_by_the_margin(times: tuple[float, ...], winner: str, clock: Clock) -> None:
    assert MARGIN == 0.03
    entrants = [clock.entrant(name, seconds) for name, seconds in zip("abc", times, strict=True)]
    assert compete("eager", entrants, IMAGE)[1].winner == winner
    assert choose({name: [t] * 3 for name, t in zip((*"abc", AGAIN), (*times, 1e-3), strict=True)}) == winner


def test_rounds_interleave_in_alternating_order(clock: Clock) -> None:
    compete("eager", [clock.entrant("a", 1.0), clock.entrant("b", 0.5)], IMAGE)
    warm = [*"aaabbbaaa"]  # the last are the first network once more
    assert clock.calls == warm + [*"aba", *"aba"] * (ROUNDS // 2)


def again_is_slower(n: int) -> float:
    """Seconds of the dense network's n-th call: those that are made to compare it with itself take 1.3."""
    n %= 6 + 2 * ROUNDS  # a batch of rounds: three calls to warm up, twice, then two a round in alternating order
    is_again = n >= 6 and (n % 2 == 1) == ((n - 6) // 2 % 2 == 0)
    return 1.3 if is_again else 1.0


def test_a_busy_machine_gets_more_rounds(clock: Clock) -> None:
    def at_first(n: int) -> float:
        return again_is_slower(n) if n < 6 + 2 * ROUNDS else 1.0

    contest = compete("eager", [clock.entrant("dense", at_first), clock.entrant("small", 0.5)], IMAGE)[1]
    # After as many quiet rounds as noisy ones the median lies between; after twice as many it is right.
    assert f", {3 * ROUNDS} rounds; " in contest.setting
    assert (contest.winner, contest.is_noisy, contest.notes) == ("small", False, ())


@pytest.mark.parametrize(("small", "winner"), [(0.5, "dense"), (0.1, "small")])
def test_a_machine_that_stays_busy_takes_only_what_is_far_faster(clock: Clock, small: float, winner: str) -> None:
    entrants = [clock.entrant("dense", again_is_slower), clock.entrant("small", small)]
    network, contest = compete("eager", entrants, IMAGE)
    assert contest.is_noisy
    assert contest.winner == winner
    assert f", {MAX_ROUNDS} rounds; " in contest.setting
    assert contest.notes == (
        "this machine is busy: the dense network against itself came out at 1.30, so nothing was taken that is not 63% "
        "faster than what is safer; measure again when nothing else runs.",
    )
    assert contest.notes[0] in str(contest).splitlines()
    assert contest.results["small"].ratio <= small
    assert AGAIN not in contest.results
    clock.calls.clear()
    with torch.inference_mode():
        network(*IMAGE.args)
    assert clock.calls == [winner]


@pytest.fixture
def choosy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that rejects an Odd."""
    real = module.build

    def build(runtime: str, network: nn.Module, inputs: Inputs, threads: int) -> nn.Module:
        if isinstance(network, Odd):
            raise network.why
        return real(runtime, network, inputs, threads)

    monkeypatch.setattr(module, "build", build)


@pytest.mark.usefixtures("choosy")
def test_rejected_entrants_are_left_out_with_a_note(clock: Clock) -> None:
    entrants = [
        clock.entrant("dense", 1.0, 0.7),
        Entrant("rejected", lambda: Odd(RuntimeBuildError("eager cannot run this Odd; do this:\nNo: because.")), 0.1),
        clock.entrant("small", 0.5, 0.3),
        Entrant("wrong", lambda: Odd(MismatchError("this Odd differs.")), 0.1),
    ]
    contest = compete("eager", entrants, IMAGE)[1]
    assert (contest.winner, list(contest.results)) == ("small", ["dense", "small"])
    assert contest.expected_ms == {"dense": 0.7, "small": 0.3}
    assert contest.notes == ("rejected is left out: No: because.", "wrong is left out: this Odd differs.")
    assert str(contest).splitlines()[4:6] == list(contest.notes)


@pytest.mark.usefixtures("choosy")
def test_the_first_that_runs_is_the_reference(clock: Clock) -> None:
    entrants = [Entrant("odd", lambda: Odd(MismatchError("no."))), clock.entrant("a", 2.0), clock.entrant("b", 1.99)]
    contest = compete("eager", entrants, IMAGE)[1]
    assert (contest.winner, contest.results["a"].ratio) == ("a", 1.0)


@pytest.mark.usefixtures("choosy")
def test_where_all_are_rejected_the_first_reason_is_raised() -> None:
    reasons = (MismatchError("one differs."), RuntimeBuildError("two is rejected."))
    for first, second in (reasons, reasons[::-1]):
        entrants = [Entrant("one", lambda: Odd(first)), Entrant("two", lambda: Odd(second))]  # noqa: B023
        with pytest.raises(type(first), match=f"^{re.escape(str(first))}$"):
            compete("eager", entrants, IMAGE)


def test_errors_of_the_networks_own_are_raised() -> None:
    with pytest.raises(InputError, match="does not run on example inputs"):
        compete("eager", [Entrant("linear", lambda: nn.Linear(3, 2))], IMAGE)


def test_inputs_on_the_meta_device_stand_for_random_ones(clock: Clock) -> None:
    contest = compete("eager", [clock.entrant("dense", 1.0)], Inputs(torch.zeros(4, 3, 5, 6, device="meta")))[1]
    assert contest.setting.startswith(f"input 4x3x5x6, {ROUNDS} rounds; eager, ")


def test_threads_are_named_and_come_back(clock: Clock) -> None:
    before = torch.get_num_threads()
    contest = compete("eager", [clock.entrant("dense", 1.0)], IMAGE, threads=before + 1)[1]
    assert f", {before + 1} threads, " in contest.setting
    assert torch.get_num_threads() == before


def test_the_report() -> None:
    contest = Contest(
        "small",
        {"dense": Result(2.0, 1.0, 0.0), "small": Result(1.25, 0.625, 0.0123)},
        {"small": 1.1},
        notes=("branches is left out: no.",),
        setting="input 1x3, 12 rounds; eager",
    )
    assert [line.rstrip() for line in str(contest).splitlines()] == [
        "network      convolutions, expected ms    measured ms    ratio to dense    spread",
        "---------  ---------------------------  -------------  ----------------  --------  ---------",
        "dense                                           2.000             1.000     0.000",
        "small                            1.100          1.250             0.625     0.012  <- chosen",
        "branches is left out: no.",
        "input 1x3, 12 rounds; eager",
    ]
