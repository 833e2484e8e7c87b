"""Bytes shared by many readers: never too many, and never everybody waiting."""

from __future__ import annotations

import random

from zarrcache.parallel._budget import Budget


def test_who_fits_goes_on_and_who_does_not_waits_for_the_others() -> None:
    """In the order in which they began."""
    budget = Budget(100)
    assert budget.ask(1, 60) == [1]
    assert budget.ask(3, 50) == []
    assert budget.ask(2, 50) == []
    assert budget.release(1) == [2, 3]
    assert budget.held_bytes == 100


def test_an_array_larger_than_the_budget_is_read_alone() -> None:
    """Nobody begins beside it, and who had begun finishes first."""
    budget = Budget(100)
    assert budget.ask(1, 30) == [1]
    assert budget.ask(2, 30) == [2]
    assert budget.ask(1, 500) == []
    assert budget.ask(3, 10) == []
    assert budget.ask(2, 40) == [2]
    assert budget.release(2) == [1]
    assert budget.held_bytes == 530
    assert budget.release(1) == [3]


def test_when_all_wait_the_one_that_began_first_goes_on() -> None:
    """Otherwise none ever would."""
    budget = Budget(100)
    assert [budget.ask(reader, 30) for reader in (1, 2, 3)] == [[1], [2], [3]]
    assert budget.ask(2, 50) == []
    assert budget.ask(3, 50) == []
    assert budget.ask(1, 50) == [1]
    assert budget.held_bytes == 140
    assert budget.release(3) == []  # it died; 20 are free, and the first will bring more
    assert budget.release(1) == [2]


def test_the_first_may_be_too_large_and_what_the_dead_wanted_is_forgotten() -> None:
    """Nothing is held, so nothing would be gained by waiting."""
    budget = Budget(0)
    assert budget.ask(7, 10) == [7]
    assert budget.ask(8, 10) == []
    assert budget.release(8) == []
    assert budget.release(7) == []
    assert budget.held_bytes == 0


def test_everybody_gets_through_and_one_array_at_the_most_is_too_many() -> None:
    """Readers of random sizes in a random order, each asking twice."""
    chance = random.Random(5)
    for most in (0, 50, 100, 400):
        budget = Budget(most)
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
                assert running, "everybody waits"
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
            assert budget.held_bytes <= most + 260
        assert done == 300
