"""The HTTP endpoint, in this process: answers, limits, and one JSON error for everything bad."""

import io
import threading
from functools import partial

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import qkd_jax
from qkd_jax import cli
from qkd_jax.cli.server import Limits, new_app
from qkd_jax.data.sources import load_split
from qkd_jax.runs import answers

LIMITS = Limits(bytes=20_000, seconds=30.0, requests=1)


@pytest.fixture(scope="module")
def trained(exported):
    return qkd_jax.load_learner(exported)


@pytest.fixture
def client(trained):
    with client_of(trained) as client:
        yield client


def client_of(trained, **changes):
    app = new_app(trained, LIMITS._replace(**changes))
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def image():
    return png(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8))


def refused(answer, status):
    """The message of a JSON error."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return answer.json()["error"]


def test_it_answers_as_the_learner_does(client, trained):
    test = load_split("synthetic", num_classes=6).test
    [pixels] = test.fetch([3])
    told = client.post("/predict?top=2", content=png(pixels))
    assert told.status_code == 200 and told.json()["milliseconds"] > 0
    expected = answers.best_classes(trained, test.load([3], trained.state.backbone), 2)
    found = [(a["class"], a["task"], a["score"], a["probability"]) for a in told.json()["answers"]]
    assert found == [tuple(a) for a in expected]


def test_texts_are_served_too(learned_texts):
    trained = qkd_jax.load_run(learned_texts)
    with client_of(trained) as client:
        told = client.post("/predict?top=1", content=b"a bird that sings")
        expected = answers.best_classes(trained, answers.text_fields(trained, "a bird that sings"))
        assert told.json()["answers"] == [expected[0].as_json()]
        assert "in UTF-8" in refused(client.post("/predict", content=b"\xff"), 422)
        assert client.get("/").json()["input"] == "text"


def test_it_tells_what_it_serves_and_that_it_lives(client, trained):
    assert client.get("/health").json() == {"status": "ok"}
    told = client.get("/").json()
    assert told["method"] == "qkd" and told["input"] == "image"
    assert {c["class"] for c in told["classes"]} == set(trained.class_names)
    assert sorted(c["task"] for c in told["classes"]) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("body", "query", "status", "told"),
    [
        (b"", "", 422, "found nothing"),
        (b"no image", "", 422, "body: expected an image"),
        (b"\xff\xd8\xff", "", 422, "body"),
        (b"x" * 20_001, "", 413, "expected at most 20,000 bytes"),
        (b"x", "?top=0", 400, "from 1 to 1000, found '0'"),
        (b"x", "?top=many", 400, "found 'many'"),
        (b"x", f"?top={'0' * 5}1{'0' * 5000}", 400, "found '00000100000000000000'"),
    ],
)
def test_bad_input_is_one_json_error(client, body, query, status, told):
    assert told in refused(client.post(f"/predict{query}", content=body), status)


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(client, image):
    parts = (b"x" * 5000 for _ in range(5))
    assert "expected at most 20,000" in refused(client.post("/predict", content=parts), 413)
    assert client.post("/predict", content=image).status_code == 200  # its place is free again


def test_other_paths_methods_and_names_are_errors_too(client):
    refused(client.get("/nowhere"), 404)
    wrong = client.get("/predict")
    refused(wrong, 405)
    assert wrong.headers["Allow"] == "POST"
    told = refused(client.get("/", headers={"Host": "evil.example"}), 421)
    assert "expected 127.0.0.1 or localhost" in told


def test_more_requests_than_places_are_refused_at_once(trained, image, monkeypatch):
    """A place is kept while its thread computes, also after the client was told of a timeout."""
    known, may_end = answers.best_classes, threading.Event()

    def slow(*arguments):
        assert may_end.wait(60)
        return known(*arguments)

    with client_of(trained, seconds=0.2) as client:
        monkeypatch.setattr(answers, "best_classes", slow)
        assert "within 0.2 s" in refused(client.post("/predict", content=image), 503)
        busy = client.post("/predict", content=image)
        assert "at most 1 requests" in refused(busy, 503) and busy.headers["Retry-After"] == "1"
        assert client.get("/health").status_code == 200
        may_end.set()
        ask = partial(client.post, "/predict", content=image)
        assert any(ask().status_code == 200 for _ in range(10_000))


def test_an_error_inside_is_told_without_its_details(trained, image, monkeypatch):
    with client_of(trained) as client:
        monkeypatch.setattr(answers, "best_classes", lambda *_: 1 / 0)
        told = refused(client.post("/predict", content=image), 500)
        assert told == "an error inside the server"
        monkeypatch.undo()
        assert client.post("/predict", content=image).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "0"], "--port: expected 1 to 65535, found 0"),
        (["--max-mib", "0"], "--max-mib"),
        (["--timeout", "-1"], "--timeout"),
        (["--concurrency", "0"], "--concurrency"),
    ],
)
def test_limits_have_limits(exported, capsys, arguments, told):
    assert cli.main(["serve", str(exported), *arguments]) == 1
    assert told in capsys.readouterr().err


def test_a_server_that_cannot_begin_ends_as_other_errors_do(exported, monkeypatch):
    def run(app, **options):
        raise SystemExit(3)  # as uvicorn at a port that is taken

    monkeypatch.setattr("uvicorn.run", run)
    assert cli.main(["serve", str(exported)]) == 1


def test_by_default_only_this_machine_is_served(exported, monkeypatch):
    served = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: served.update(options))
    assert cli.main(["serve", str(exported)]) == 0
    assert served["host"] == "127.0.0.1" and served["port"] == 8000
    assert served["limit_concurrency"] >= 4
