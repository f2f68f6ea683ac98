"""transformers loads an exported folder in every class and pipeline that it is for, without a warning."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from minisobert import inference
from minisobert.corpus.tokenizer import CLS, SEP
from minisobert.files import read_safetensors
from minisobert.finetuning import encoder
from minisobert.finetuning.loop import predict
from minisobert.hub.__main__ import main
from minisobert.hub.weights import FORMATS, to_ours
from minisobert.ops import Documents
from minisobert.tasks.dataset import Example
from minisobert.tasks.words import WORD
from minisobert.training.run import open_run
from tests.finetuning.test_finetune import read_toys
from tests.finetuning.test_finetune import run as finetune
from tests.runs import BATCH, ROW, SMALL, make_small, words

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

TEXT = "bar gin dust\n    return;\tfe"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> dict[str, Path]:
    """A run of each architecture, long enough for its guesses to differ, with three checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setitem)
        torch.set_num_threads(1)
        two_steps = 2 * BATCH
        options = {"learning_rate": 5e-3, "optimizer": "adamw", "price_per_gpu_hour": 1e3, "keep_checkpoints": 3,
                   "checkpoint_every_tokens": two_steps, "eval_every_tokens": two_steps}  # fmt: skip
        for architecture, preset in {"megatron-bert": "tiny", "modernbert": "modern-tiny"}.items():
            train.main(words(corpus, folder / architecture, steps=6, preset=preset, **options))
    return {name: folder / name for name in ("megatron-bert", "modernbert")}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for format in FORMATS:
        main(["export", str(run_of(runs, format)), "--out", str(folder / format), "--as", format])
    return {format: folder / format for format in FORMATS}


def run_of(runs, format: str) -> Path:
    return runs["modernbert" if format == "modernbert" else "megatron-bert"]


def states(folder: Path, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The final states and the logits that our own model gives for a text: [CLS], its pieces and [SEP]."""
    trained = open_run(folder)
    tokens = torch.tensor([CLS, *trained.tokenizer.encode(text).tolist(), SEP])
    places, documents = torch.arange(len(tokens)), Documents.from_bounds([0, len(tokens)])
    with torch.no_grad():
        return (trained.model.encoder(tokens, places, documents),
                trained.model(tokens, places, documents, places)[:, : trained.tokenizer.vocab_size])  # fmt: skip


def loaded(kind: str, folder: Path, capfd, expected: tuple[set, set] = (set(), set()), **options):
    """AutoModelForKIND. Asserts that just these weights are missing and unexpected, and that nothing is printed if none
    are."""
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert (info["missing_keys"], info["unexpected_keys"]) == expected
    assert not info["mismatched_keys"] and not info["error_msgs"]
    assert not found and (any(expected) or capfd.readouterr() == ("", ""))
    return model.eval()


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_is_loaded_whole_and_computes_the_same(format, runs, exported, capfd):
    hidden, logits = states(run_of(runs, format), TEXT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[format])
    inputs = tokenizer([TEXT, TEXT * 3], padding=True, return_tensors="pt")
    for attention in ("eager",) if format == "megatron-bert" else ("eager", "sdpa"):
        model = loaded("AutoModelForMaskedLM", exported[format], capfd, attn_implementation=attention)
        with torch.no_grad():
            found = model(**inputs).logits[0, : len(logits)]
        assert (found[:, : logits.shape[1]] - logits).abs().max() < 1e-5 * logits.abs().max()
        assert (found[:, logits.shape[1] :] < -1_000).all()  # rows without a piece
    assert logits.std() > 0.1
    with safetensors.safe_open(exported[format] / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # older versions ask for it

    pooler = set() if format == "modernbert" else {"pooler.dense.weight", "pooler.dense.bias"}
    head = {"modernbert": ("head.", "decoder."), "megatron-bert": ("cls.",), "xlm-roberta-xl": ("lm_head.",)}[format]
    of_head = {name for name in read_safetensors(exported[format] / "model.safetensors") if name.startswith(head)}
    model = loaded("AutoModel", exported[format], capfd, (pooler, of_head))
    with torch.no_grad():
        found = model(**inputs).last_hidden_state[0, : len(hidden)]
    assert (found - hidden).abs().max() < 1e-5 * hidden.abs().max()
    features = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer)(TEXT)
    assert (torch.tensor(features)[0] - hidden).abs().max() < 1e-5 * hidden.abs().max()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", ["bar [MASK] gin", "[MASK] gin", "bar[MASK]", "bar [MASK] [MASK] gin"])
def test_masks_are_filled_as_the_playground_fills_them(format, text, runs, exported):
    trained = open_run(run_of(runs, format))
    expected = inference.guess(trained, *inference.with_masks(trained, text), best=5)
    found = transformers.pipeline("fill-mask", model=str(exported[format]))(text)
    found = [found] if isinstance(found[0], dict) else found
    for guesses, theirs in zip(expected, found, strict=True):
        assert [piece for piece, _ in guesses] == [each["token_str"] for each in theirs]
        assert [p for _, p in guesses] == pytest.approx([each["score"] for each in theirs], rel=1e-4)


def test_the_tokenizer_is_the_runs_also_when_saved_again(runs, exported, tmp_path):
    ours = open_run(runs["modernbert"]).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(exported["modernbert"])
    theirs.save_pretrained(tmp_path)
    for tokenizer in (theirs, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(TEXT)["input_ids"] == [CLS, *ours.encode(TEXT).tolist(), SEP]
        assert tokenizer("a", "b")["input_ids"] == [CLS, *ours.encode("a"), SEP, *ours.encode("b"), SEP]
        assert set(tokenizer(TEXT)) == {"input_ids", "attention_mask"}
        assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
        assert tokenizer.tokenize("bar [MASK]") == [*tokenizer.tokenize("bar[MASK]")[:-1], " [MASK]"]
        assert tokenizer.model_max_length == ROW and len(tokenizer) == ours.vocab_size
        assert len(tokenizer("bar " * 2_000, truncation=True)["input_ids"]) == ROW


@pytest.mark.parametrize("format", FORMATS)
def test_sentence_transformers_finds_mean_pooling(format, exported):
    """It is not a dependency; version 6.2.0 was once seen to give the mean of the final states, in all formats."""
    folder = exported[format]
    types = [each["type"].rpartition(".")[2] for each in json.loads((folder / "modules.json").read_text())]
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    assert types == ["Transformer", "Pooling"] and pooling["word_embedding_dimension"] == SMALL.hidden
    assert [name for name, on in pooling.items() if on is True] == ["pooling_mode_mean_tokens"]
    options = json.loads((folder / "sentence_bert_config.json").read_text())
    assert options["max_seq_length"] == (ROW if format == "modernbert" else SMALL.positions)
    model = transformers.AutoModel.from_pretrained(folder, **options.get("model_args", {}))
    assert getattr(model, "pooler", None) is None  # it would be random


def test_the_best_and_any_other_checkpoint_can_be_exported(runs, tmp_path):
    run = runs["modernbert"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "validation_loss" in line), key=lambda line: line["validation_loss"])["step"]
    paths = {step: run / f"checkpoints/step-{step:08}/model.safetensors" for step in (2, 4, 6)}
    config = open_run(run).model.config
    for name, step in {"": 6, "last": 6, "best": best, "step-2": 2, "step-4": 4}.items():
        out = tmp_path / (name or "default")
        main(["export", str(run), "--out", str(out), *(["--checkpoint", name] if name else [])])
        expected = read_safetensors(paths[step])
        found = to_ours(read_safetensors(out / "model.safetensors"), config, "modernbert")
        differ = [name for name, p in expected.items() if not torch.equal(p, found[name])]
        assert differ == ["mlm_head.decoder.bias"]  # in the rows without a piece
        assert f"| steps | {step} |" in (out / "README.md").read_text()


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_says_what_the_run_knows(format, runs, exported, corpus):
    folder = exported[format]
    text = (folder / "README.md").read_text()
    front = text.split("---\n")[1]
    assert "library_name: transformers\npipeline_tag: fill-mask\n" in front and "- sentence-transformers\n" in front
    assert "license" not in front  # texts of unknown origin
    last = json.loads((run_of(runs, format) / "metrics.jsonl").read_text().splitlines()[-1])
    for said in (
        f"| documents | {len(corpus.offsets) - 1:,}, of which {len(corpus.validation_documents):,} are held out |",
        f"| tokens seen | {last['tokens']:,} |", "| sources | toy.jsonl |", "| peak learning rate | 0.005 |",
        f"| held-out loss | {last['validation_loss']:.4f} nats |", f"| cost | ${last['dollars']:,.2f} |",
        f"| held-out tokens guessed right | {last['validation_accuracy']:.1%} |", "![loss](loss.png)",
    ):  # fmt: skip
        assert said in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert ("only eager attention" in text) == (format == "megatron-bert")


def test_dumps_are_cited_with_their_licence_and_what_is_unknown_is_left_out(runs, tmp_path, monkeypatch):
    for name in ("dump", "other"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        for path in runs["modernbert"].iterdir():
            (run / path.name).symlink_to(path)
        described = json.loads((run / "config.json").read_text())
        described["corpus"] |= {"posts": 7, "comments": 3}
        if name == "other":  # as an older version wrote it
            del described["corpus"]
        (run / "config.json").unlink()
        (run / "config.json").write_text(json.dumps(described))
        if name == "other":
            monkeypatch.setitem(sys.modules, "matplotlib", None)
        main(["export", str(run), "--out", str(tmp_path / f"out-{name}")])
    dump, other = ((tmp_path / f"out-{name}/README.md").read_text() for name in ("dump", "other"))
    assert (
        dump.startswith("---\nlicense: cc-by-sa-4.0\n") and "| posts of Stack Exchange | 7, with 3 comments |" in dump
    )
    assert "license" not in other and "## Data" not in other and "loss.png" not in other


@pytest.fixture(scope="module")
def fine_tuned(runs, tmp_path_factory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        read_toys(patch)
        make_small(patch.setitem)
        torch.set_num_threads(1)
        for name, run in runs.items():
            for task in ("quality", "ner"):
                finetune(task, folder / f"{name}-{task}", str(run), epochs=2)
    return {(name, task): folder / f"{name}-{task}" for name in runs for task in ("quality", "ner")}


@pytest.mark.parametrize("format", FORMATS)
def test_a_fine_tuned_classifier_gives_the_probabilities_of_predict(format, fine_tuned, tmp_path, capfd):
    source = fine_tuned["modernbert" if format == "modernbert" else "megatron-bert", "quality"]
    main(["export", str(source), "--out", str(tmp_path / "out"), "--as", format])
    texts = ["please ban dot", "dot fist", "ban\n    ren please " * 20]
    network = encoder.open_network(source / "model", task := json.loads((source / "model/task.json").read_text()))
    expected = np.concatenate(predict(network, network.encode([Example("", text) for text in texts])))
    assert expected.std(0).min() > 1e-3
    model = loaded("AutoModelForSequenceClassification", tmp_path / "out", capfd)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for found, p in zip(classify(texts), expected):
        assert {each["label"]: each["score"] for each in found} == pytest.approx(dict(zip(task["labels"], p)), abs=1e-5)
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "on 200 examples" in card and "| accuracy |" in card


@pytest.mark.parametrize("format", FORMATS)
def test_a_fine_tuned_tagger_finds_the_entities_of_predict(format, fine_tuned, tmp_path, capfd):
    """Used as its card says, on words with one space between them."""
    source = fine_tuned["modernbert" if format == "modernbert" else "megatron-bert", "ner"]
    main(["export", str(source), "--out", str(tmp_path / "out"), "--as", format])
    text = "import ban, class fin of dust dot; import dur dot\nclass(zen)"
    network = encoder.open_network(source / "model", task := json.loads((source / "model/task.json").read_text()))
    sentence = tuple(WORD.findall(text))
    (p,) = predict(network, network.encode([Example("", words=sentence)]))
    expected = [(word, task["labels"][row.argmax()], row.max()) for word, row in zip(sentence, p) if row.argmax()]
    assert len(expected) > 3
    model = loaded("AutoModelForTokenClassification", tmp_path / "out", capfd)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    joined = " ".join(sentence)
    tag = partial(transformers.pipeline, "token-classification", model=model, tokenizer=tokenizer)
    found = [each for each in tag()(joined) if each["start"] == 0 or joined[each["start"]] == " "]
    assert [(joined[each["start"] :].split()[0], each["entity"]) for each in found] == [each[:2] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([score for *_, score in expected], abs=1e-5)
    with pytest.warns(UserWarning, match="does not support real words"):
        entities = tag(aggregation_strategy="first")(joined)
    assert ("Library", " dust dot") in {(each["entity_group"], each["word"]) for each in entities}
    card = (tmp_path / "out/README.md").read_text()
    assert WORD.pattern in card and "pipeline_tag: token-classification" in card


def test_writing_needs_none_of_their_libraries(runs, tmp_path):
    code = (
        "import sys; sys.modules |= dict.fromkeys(('transformers', 'tokenizers', 'safetensors', 'huggingface_hub'))\n"
        f"from minisobert.hub.__main__ import main; main(['export', {str(runs['modernbert'])!r}, '--out', 'out'])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root)}, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "out: a modernbert, with its tokenizer and a model card\n" and (tmp_path / "out").is_dir()


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(runs, fine_tuned, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    run, tuned = str(runs["megatron-bert"]), fine_tuned["modernbert", "quality"]
    theirs = tmp_path / "theirs"
    (theirs / "model").mkdir(parents=True)
    (theirs / "model/task.json").write_text('{"format": "transformers"}')
    for argv, out, said in (
        ([str(tmp_path / "nothing")], "out", "holds no checkpoint; give the --out of a run of train.py that has saved"),
        ([run, "--as", "modernbert"], "out", "choose megatron-bert or xlm-roberta-xl"),
        ([run, "--as", "bert"], "out", "invalid choice: 'bert'"),
        ([run, "--checkpoint", "step-3"], "out", "no checkpoint 'step-3'; choose step-2, step-4, step-6, last or best"),
        ([str(tuned), "--checkpoint", "best"], "out", "is a fine-tuned model; leave it out"),
        ([str(theirs)], "out", "is in Hugging Face's format already; use that folder"),
        ([run], "there", "exists already and is not empty"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", *argv, "--out", str(tmp_path / out)])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_tanh_form_goes_out_as_megatron_bert_alone(corpus, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setitem)
        train.main(words(corpus, tmp_path / "run", steps=1, gelu="tanh", learning_rate=5e-3, warmup_fraction=0))
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "give --as megatron-bert" in capfd.readouterr().err
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--as", "megatron-bert"])
    _, logits = states(tmp_path / "run", TEXT)
    model = loaded("AutoModelForMaskedLM", tmp_path / "out", capfd)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = model(**tokenizer(TEXT, return_tensors="pt")).logits[0, :, : logits.shape[1]]
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()
