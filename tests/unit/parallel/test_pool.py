"""The memory budget of a pool, and what is reported of a process that died."""

from __future__ import annotations

import random
import signal

import pytest

from zarrcache.parallel.pool import Budget, Died


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (3, "exit code 3"),
        (-signal.SIGKILL, "SIGKILL, perhaps out of memory"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (-40, "signal 40"),  # a real-time signal, which has no name
        (None, "cause unknown; see the system log of its machine"),
    ],
)
def test_the_cause_of_a_death_is_named(exitcode: int | None, words: str) -> None:
    assert str(Died(exitcode)) == words


def test_a_budget_grants_requests_that_fit_in_the_order_in_which_readers_began() -> None:
    budget = Budget(100)
    assert budget.ask(1, 60) == [1]
    assert budget.ask(3, 50) == []
    assert budget.ask(2, 50) == []
    assert budget.release(1) == [2, 3]
    assert budget.held_bytes == 100


def test_an_array_larger_than_the_budget_is_read_alone() -> None:
    """No reader begins beside it, and readers that have begun finish first."""
    budget = Budget(100)
    assert budget.ask(1, 30) == [1]
    assert budget.ask(2, 30) == [2]
    assert budget.ask(1, 500) == []
    assert budget.ask(3, 10) == []
    assert budget.ask(2, 40) == [2]
    assert budget.release(2) == [1]
    assert budget.held_bytes == 530
    assert budget.release(1) == [3]


def test_when_all_readers_wait_the_one_that_began_first_goes_on() -> None:
    budget = Budget(100)
    assert [budget.ask(reader, 30) for reader in (1, 2, 3)] == [[1], [2], [3]]
    assert budget.ask(2, 50) == []
    assert budget.ask(3, 50) == []
    assert budget.ask(1, 50) == [1]
    assert budget.held_bytes == 140
    assert budget.release(3) == []  # it died; 20 are free, and the first will give back more
    assert budget.release(1) == [2]


def test_the_first_request_may_exceed_the_budget_and_a_dead_reader_is_forgotten() -> None:
    """Nothing is held, so waiting would gain nothing."""
    budget = Budget(0)
    assert budget.ask(7, 10) == [7]
    assert budget.ask(8, 10) == []
    assert budget.release(8) == []
    assert budget.release(7) == []
    assert budget.held_bytes == 0


def test_every_reader_finishes_and_at_most_one_array_exceeds_the_budget() -> None:
    """Readers of random sizes in a random order, each asking twice."""
    chance = random.Random(5)
    for limit in (0, 50, 100, 400):
        budget = Budget(limit)
        needs = {
            reader: [chance.randrange(1, 60), chance.randrange(1, 200)] for reader in range(300)
        }
        todo, running, waiting = list(needs), set[int](), set[int]()
        done = 0
        while todo or running or waiting:
            if todo and len(running | waiting) < 8:
                reader = todo.pop(0)
                waiting.add(reader)
                went = budget.ask(reader, needs[reader].pop(0))
            else:
                assert running, "all readers wait"
                reader = chance.choice(sorted(running))
                running.discard(reader)
                if needs[reader]:
                    waiting.add(reader)
                    went = budget.ask(reader, needs[reader].pop(0))
                else:
                    done += 1
                    went = budget.release(reader)
            waiting -= set(went)
            running |= set(went)
            assert budget.held_bytes <= limit + 260
        assert done == 300
