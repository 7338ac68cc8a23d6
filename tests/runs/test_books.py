"""Seconds by a clock that the test moves, and counts over sessions."""

import json

import pytest

from qkd_jax.runs.books import Books


class Clock:
    """Seconds that only the test lets pass."""

    def __init__(self, began=0.0):
        self.seconds = began

    def __call__(self):
        return self.seconds

    def passes(self, seconds):
        self.seconds += seconds


@pytest.fixture
def clock():
    return Clock(1000.0)


def step(books, clock, seconds, images):
    books.start_step()
    clock.passes(seconds)
    books.end_step(images)


def test_laps_are_booked_by_name_and_follow_one_another(clock):
    books = Books(clock)
    clock.passes(1)  # before the first task: of the run, of no lap
    for train, evaluation in ((3, 2), (5, 4)):
        books.start_lap()
        clock.passes(train)
        books.end_lap("train")
        clock.passes(evaluation)
        books.end_lap("eval")
    found = books.summary()
    assert (found["train_seconds"], found["eval_seconds"]) == (8, 6)
    assert found["wall_seconds"] == books.wall_seconds() == 15


def test_the_rate_leaves_out_the_first_step_and_what_lies_between_steps(clock):
    books = Books(clock)
    step(books, clock, 50, 8)  # compiles
    assert books.summary()["training_images_per_second"] is None
    step(books, clock, 2, 8)
    clock.passes(100)  # a checkpoint
    step(books, clock, 1, 4)
    found = books.summary()
    assert found["training_images_per_second"] == 12 / 3
    assert found["train_images"] == books.trained == 20


def test_a_session_goes_on_where_the_last_checkpoint_stood(clock):
    first = Books(clock)
    for seconds in (50, 2):
        step(first, clock, seconds, 8)
    first.end_lap("train")
    first.extracted += 7
    kept = json.loads(json.dumps(first.saved()))
    clock.passes(30)  # lost with what was done in it
    later = Clock(5.0)  # another machine's clock
    second = Books(later)
    second.restore(kept)
    for seconds in (40, 4):  # the first step of every session compiles
        step(second, later, seconds, 8)
    second.end_lap("train")
    second.extracted += 1
    found = second.summary()
    assert found["wall_seconds"] == found["train_seconds"] == 52 + 44
    assert found["training_images_per_second"] == 16 / (2 + 4)
    assert (found["train_images"], found["extracted_features"]) == (32, 8)


def test_saving_changes_nothing(clock):
    books = Books(clock)
    clock.passes(10)
    assert books.saved()["spent"]["wall"] == 10
    assert books.saved()["spent"]["wall"] == books.wall_seconds() == 10


def test_peak_memory_is_the_largest_of_all_sessions(clock):
    books = Books(clock)
    here = books.summary()["peak_memory_mb"]
    assert 0 < here < 1e9
    kept = books.saved()
    kept["spent"]["peak_memory_mb"] = 1e9  # an earlier session took more
    books.restore(kept)
    assert books.summary()["peak_memory_mb"] == books.saved()["spent"]["peak_memory_mb"] == 1e9


def test_two_runs_in_one_process_share_nothing(clock):
    books = Books(clock)
    clock.passes(3)
    books.end_lap("train")
    assert Books(clock).summary()["train_seconds"] == 0
