"""The examples in docstrings run, and what the reference shows has one."""

import doctest
import importlib
import inspect

import pytest

import qkd_jax
from qkd_jax.protocol import metrics

EXAMPLES = (
    "qkd_jax.learners.shape",
    *("qkd_jax.engine.verbs", "qkd_jax.nn.tokens", "qkd_jax.protocol.metrics"),
    *("qkd_jax.protocol.tasks", "qkd_jax.settings.config", "qkd_jax.weights.load"),
)
# They read folders, or need a teacher: their examples are runs, in the tests of their own.
LARGER = {"load_run", "load_learner", "teacher_outputs", "predict_with_relevance"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    module = importlib.import_module(name)
    tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried.attempted and not tried.failed


def test_every_public_function_stands_in_an_example():
    finder = doctest.DocTestFinder(recurse=True)
    found = [test for name in EXAMPLES for test in finder.find(importlib.import_module(name))]
    shown = "".join(example.source for test in found for example in test.examples)
    public = {name for name in qkd_jax.__all__ if inspect.isfunction(getattr(qkd_jax, name))}
    public |= {
        name for name, _ in inspect.getmembers(metrics, inspect.isfunction) if name[0] != "_"
    }
    assert sorted(name for name in public - LARGER if f"{name}(" not in shown) == []
