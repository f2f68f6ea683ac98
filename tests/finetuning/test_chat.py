"""finetuning.chat with a local server that follows the chat-completions protocol, and sometimes breaks it."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("openai")

from minisobert import tasks
from minisobert.finetuning import chat, evaluation, prompts
from minisobert.tasks import metrics
from minisobert.tasks.dataset import Dataset, Example

LABELS = ("O", "B-Library", "I-Library", "B-Language", "I-Language")


def quality(paths, seed, **options) -> Dataset:
    def split(name: str, n: int) -> list[Example]:
        texts = [f"{name} post {i} is {'good' if i % 3 else 'bad'}" for i in range(n)]
        return [Example(f"{name}-{i}", text, int("good" in text)) for i, text in enumerate(texts)]

    return Dataset(tasks.TASKS["quality"], ("LQ", "HQ"), split("a", 30), split("b", 6), split("c", 12), ["a toy"])


def ner(paths, seed) -> Dataset:
    examples = [
        Example("0", words=("I", "use", "numpy", "in", "Python", "3"), tags=(0, 0, 1, 0, 3, 4)),
        Example("1", words=("No", "idea"), tags=(0, 0)),
        Example("2", words=("numpy", "or", "Java"), tags=(1, 0, 3)),
    ]
    return Dataset(tasks.TASKS["ner"], LABELS, examples, examples, examples)


class Server:
    """A server. answer: messages → text of the reply. failures: what the next requests get instead, in order."""

    def __init__(self):
        self.requests: list[dict] = []
        self.failures: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.answer = lambda messages: "HQ" if "good" in messages[-1]["content"] else "LQ"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == "Bearer word"
                outer.requests.append(body)
                if outer.failures and (failure := outer.failures.pop(0)):
                    return failure(self)
                message = {"role": "assistant", "content": outer.answer(body["messages"])}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
                reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
                send(self, 200, json.dumps({**reply, "choices": [choice], "usage": usage}))

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"


def send(handler: BaseHTTPRequestHandler, status: int, body: str, kind: str = "application/json", **headers) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(body.encode())), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body.encode())


def failing(status: int, **headers) -> Callable:
    return lambda handler: send(handler, status, '{"error": {"message": "not now"}}', **headers)


def late(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)  # longer than the test's --timeout


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name, read in {"quality": quality, "ner": ner}.items():
        monkeypatch.setitem(tasks.TASKS, name, replace(tasks.TASKS[name], read=read))
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def run(server: Server, out: str = "out", task: str = "quality", **options) -> dict:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    fixed = ["--task", task, "--data", "toy", "--model", "gpt", "--base-url", server.url, "--cache", "answers.jsonl"]
    assert chat.main([*fixed, "--out", out, *words]) == 0
    return json.loads((Path(out) / "metrics.json").read_text())


def refused(server: Server, capsys, **options) -> str:
    with pytest.raises(SystemExit) as exit:
        run(server, **options)
    assert exit.value.code == 2 and not Path("out").exists()
    return capsys.readouterr().err.splitlines()[-1]


def test_right_answers_give_full_marks(server):
    found = run(server)
    assert found["mean"] == {"accuracy": 1, "macro_f1": 1}
    assert found["counts"] == {"train": 30, "dev": 6, "test": 12}
    assert len(server.requests) == 12
    assert all(request["temperature"] == 0 and request["model"] == "gpt" for request in server.requests)


def test_a_second_run_asks_nothing(server):
    first = run(server)
    again = run(server, out="again")
    assert len(server.requests) == 12
    assert (first["account"].pop("asked_now"), again["account"].pop("asked_now")) == (12, 0)
    assert again["settings"].pop("out") != first["settings"].pop("out")
    assert again == first


def test_another_model_is_asked_again(server):
    run(server)
    run(server, out="again", model="other")
    assert len(server.requests) == 24


def test_what_was_answered_before_a_failure_is_not_asked_again(server, capsys):
    server.failures = [None, None, None, failing(401)]
    assert "not now" in refused(server, capsys)
    assert len(server.requests) == 4
    run(server)
    assert len(server.requests) == 4 + 9


def test_ctrl_c_keeps_the_answers(server, monkeypatch, capsys):
    ask = chat.Chat._ask

    def interrupted(self, messages):
        if self.asked == 5:
            raise KeyboardInterrupt
        return ask(self, messages)

    with monkeypatch.context() as patch:
        patch.setattr(chat.Chat, "_ask", interrupted)
        words = ["--task", "quality", "--data", "toy", "--model", "gpt", "--base-url", server.url, "--out", "out"]
        with pytest.raises(SystemExit, match="130"):
            chat.main([*words, "--cache", "answers.jsonl"])
    assert not Path("out").exists()
    assert run(server)["account"]["asked_now"] == 7


def test_a_line_that_was_cut_off_is_asked_again(server):
    run(server)
    path = Path("answers.jsonl")
    path.write_text(path.read_text()[:-20])
    assert run(server, out="again")["account"]["asked_now"] == 1
    assert run(server, out="third")["account"]["asked_now"] == 0


def test_429_500_and_a_time_out_are_asked_again(server):
    server.failures = [failing(429, **{"Retry-After": "0.1"}), failing(500), None, late]
    found = run(server, timeout=0.4)
    assert found["mean"]["accuracy"] == 1
    assert len(server.requests) == 12 + 3


def test_a_failure_that_lasts_ends_in_a_line(server, capsys, monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 1)
    server.failures = [failing(429, **{"Retry-After": "0.1"})] * 2
    message = refused(server, capsys)
    assert "429" in message and "answers.jsonl keeps the answers so far" in message
    assert len(server.requests) == 2


@pytest.mark.parametrize(("body", "kind"), [
    ("{", "application/json"),
    ("<html>Welcome</html>", "text/html"),
    ("[]", "application/json"),
    ("{}", "application/json"),
    ('{"choices": []}', "application/json"),
    ('{"choices": [{"message": null}]}', "application/json"),
    ('{"choices": [{"message": {"content": 5}}]}', "application/json"),
    ('{"choices": [{"message": {"content": "HQ"}}], "usage": {"prompt_tokens": "many"}}', "application/json"),
])  # fmt: skip
def test_what_is_no_chat_completion_is_never_counted(server, capsys, body, kind):
    server.failures = [None, lambda handler: send(handler, 200, body, kind)]
    assert "sent no chat completion; answers.jsonl keeps" in refused(server, capsys)
    assert len(Path("answers.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("text", ["", "HQ or LQ", "The label is HQ", "high", None])
def test_an_unparsable_answer_counts_as_wrong(server, text):
    right = server.answer
    server.answer = lambda messages: text if "post 1 " in messages[-1]["content"] else right(messages)
    found = run(server)
    assert found["unparsable"] == 1
    assert found["mean"]["accuracy"] == 11 / 12
    assert found["per_class"]["HQ"]["recall"] == 7 / 8 and found["per_class"]["HQ"]["precision"] == 1
    assert found["mean"]["macro_f1"] == pytest.approx((1 + 14 / 15) / 2)
    assert "`c-1`" in Path("out/report.md").read_text()
    with open("out/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows if row["predicted"] == "unparsable"] == ["c-1"]
    assert sum(row["label"] == row["predicted"] for row in rows) == 11


def test_case_and_marks_around_a_label_do_not_matter(server):
    server.answer = lambda messages: " **hq**.\n" if "good" in messages[-1]["content"] else '"Lq"'
    assert run(server)["mean"]["accuracy"] == 1


def test_shots_are_of_all_classes_in_turn_and_from_train(server):
    run(server, shots=4)
    roles = [message["role"] for message in server.requests[0]["messages"]]
    assert roles == ["system", *["user", "assistant"] * 4, "user"]
    shown = server.requests[0]["messages"][1:-1]
    assert all(message["content"].startswith("a post") for message in shown[::2])
    assert sorted(message["content"] for message in shown[1::2]) == ["HQ", "HQ", "LQ", "LQ"]
    assert all(request["messages"][1:-1] == shown for request in server.requests)


def test_a_smaller_sample_is_part_of_a_larger_one():
    data = quality([], 0)
    small, large = ([e.id for e in chat.sample(data, n).test] for n in (3, 7))
    assert len(small) == 3 and set(small) < set(large) and small != [e.id for e in data.test[:3]]
    assert chat.sample(data, 12) is data


def test_the_cost_is_that_of_all_answers(server, capsys):
    run(server, limit=5)
    account = run(server, out="again", price_in=2.5, price_out=10, limit=8)["account"]
    assert account["dollars"] == pytest.approx(8 * (100 * 2.5 + 2 * 10) / 1e6)
    assert (account["answers"], account["asked_now"]) == (8, 3)
    line = "again/report.md: macro_f1 1.0000 on test, 0 of 8 answers unparsable, 0.00 dollars\n"
    assert capsys.readouterr().out.endswith(line)


def entities(server: Server, answers: dict[str, str]) -> None:
    server.answer = lambda messages: answers.get(messages[-1]["content"].split()[0], "[]")


def test_entities_are_found_again_in_their_sentence(server):
    data = ner([], 0)
    entities(server, {e.words[0]: prompts.answer(data, e) for e in data.test})
    found = run(server, task="ner", shots=2)
    assert found["mean"]["f1"] == found["mean"]["accuracy"] == 1
    assert len(server.requests[0]["messages"]) == 6


def test_the_figures_of_entities_are_those_of_finetune(server):
    """One entity is right, one has a wrong end, one is in no sentence; those of the unparsable answer are missed."""
    wrong = [("numpy", "Library"), ("Python", "Language"), ("scipy", "Library")]
    text = json.dumps([{"text": name, "type": kind} for name, kind in wrong])
    entities(server, {"I": f"```json\n{text}\n```", "numpy": "numpy is a library"})
    found = run(server, task="ner")
    assert (found["unparsable"], found["invented"]) == (1, 1)
    assert found["mean"]["precision"] == 1 / 3 and found["mean"]["recall"] == 1 / 4
    assert found["mean"]["accuracy"] == (5 + 2) / (6 + 1 + 2 + 3)


@pytest.mark.parametrize("text", [
    "", "null", "3", "{}", '["numpy"]', '[{"text": "numpy"}]', '[{"text": "numpy", "type": "Fruit"}]',
    '[{"text": " ", "type": "Library"}]', '[{"text": 3, "type": "Library"}]', '[{"text": "numpy", "type": []}]',
    '[{"text": "\\ud800", "type": "Library"}]', "[" * 100_000, 'Here: [{"text": "numpy", "type": "Library"}]',
])  # fmt: skip
def test_what_is_no_list_of_entities_is_unparsable(text):
    data = ner([], 0)
    assert prompts.parse(data, data.test[0], text) == (data.test[0], [len(LABELS)] * 6)


@pytest.mark.parametrize(("texts", "tags"), [
    (["a b"], "B I O O"),
    (["ab"], "B I O O"),
    (["c", "a"], "O O B B"),  # in order, if possible
    (["c", "b"], "O B B O"),
    (["a", "a"], "B O O B"),
    (["a", "a", "a"], "B O O B B"),  # one more than the sentence has
    (["a b", "b"], "B I O O B"),  # the second word is taken
    (["x"], "O O O O B"),
])  # fmt: skip
def test_alignment(texts, tags):
    words = ("a", "b", "c", "a")
    text = json.dumps([{"text": each, "type": "Library"} for each in texts])
    e, classes = prompts.parse(ner([], 0), Example("", words=words, tags=(0,) * 4), text)
    assert " ".join(LABELS[i][0] for i in classes) == tags
    assert len(e.words) == len(e.tags) == len(classes)


def test_entities_after_a_sentence_are_apart_from_it():
    data = ner([], 0)
    text = json.dumps([{"text": name, "type": "Language"} for name in ("Java", "C", "C")])
    _, classes = prompts.parse(data, data.test[2], text)
    assert metrics.entities(evaluation.names(data, classes)) == {("Language", i, i + 1) for i in (2, 3, 4)}


@pytest.mark.parametrize(("options", "message"), [
    ({"shots": 31}, "--shots is 31, but train has only 30 examples; choose fewer"),
    ({"shots": -1}, "--shots is -1; it must be at least 0"),
    ({"limit": 0}, "--limit is 0; it must be at least 1"),
    ({"timeout": "nan"}, "--timeout is nan; it must be more than 0"),
    ({"price_in": 1}, "--price-in and --price-out go together; give both or none"),
    ({"base_url": "localhost"}, "--base-url is 'localhost'; it must be an address like http://localhost:8000/v1"),
    ({"base_url": "http://a:port"}, "--base-url is 'http://a:port'; it must be an address like http://localhost:8000/v1"),
    ({"cache": "."}, "--cache .: Is a directory"),
    ({"cache": "notes.txt"}, "--cache notes.txt holds no answers; name another file"),
])  # fmt: skip
def test_mistakes_end_in_one_line(server, capsys, options, message):
    Path("notes.txt").write_text("milk\n")
    assert refused(server, capsys, **options) == f"minisobert.finetuning.chat: {message}"
    assert not server.requests and Path("notes.txt").read_text() == "milk\n"


def test_nothing_is_written_where_the_data_cannot_be_read(server, capsys, monkeypatch):
    missing = replace(tasks.TASKS["quality"], read=lambda *args, **options: Path("missing").read_text())
    monkeypatch.setitem(tasks.TASKS, "quality", missing)
    assert "missing" in refused(server, capsys, cache="new/answers.jsonl")
    assert not list(Path().iterdir())


def test_a_post_that_the_server_refuses_counts_as_wrong(server, capsys):
    server.failures = [None, failing(400)]
    found = run(server)
    assert found["unparsable"] == 1 and found["mean"]["accuracy"] == 11 / 12
    assert "refused: Error code: 400" in Path("out/report.md").read_text()


def test_a_server_that_refuses_the_first_post_ends_in_a_line(server, capsys):
    server.failures = [failing(400)]
    assert "400" in refused(server, capsys)


def test_another_server_is_asked_again(server):
    run(server)
    run(server, out="again", base_url=server.url.replace("127.0.0.1", "localhost"))
    assert len(server.requests) == 24


def test_a_key_is_asked_for(server, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set" in refused(server, capsys)
