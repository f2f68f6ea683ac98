"""Models that transformers made, with random weights: we read the same logits, and a run can continue from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data.prepare import prepare
from minisobert import playground
from minisobert.config import RECIPES
from minisobert.corpus.shards import open_shards
from minisobert.finetuning import encoder
from minisobert.finetuning.config import FineTuneConfig
from minisobert.hub import importing
from minisobert.hub.__main__ import main as hub
from minisobert.ops import Documents
from minisobert.training.run import open_run
from tests.conftest import sentences
from tests.corpus.test_json_tokenizer import byte_level
from tests.runs import column, make_small, metrics, train_all, weights, words

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(folder: Path, kind: str, **changes) -> Path:
    """A model of transformers, with random weights large enough to matter, and a tokenizer."""
    torch.manual_seed(0)
    made = tokenizers.Tokenizer.from_str(byte_level(tuple(sentences(200, seed=0)), 395))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]",
    )  # fmt: skip
    ids = {"pad_token_id": fast.pad_token_id, "bos_token_id": fast.cls_token_id, "eos_token_id": fast.sep_token_id}
    settings = {**SIZES, **ids, "vocab_size": 400, "max_position_embeddings": 96, "initializer_range": 0.2, **changes}
    if kind == "ModernBert":
        settings |= {"cls_token_id": fast.cls_token_id, "sep_token_id": fast.sep_token_id}
    model = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def logits(model, ids: np.ndarray) -> torch.Tensor:
    everything = torch.arange(len(ids))
    return model(torch.from_numpy(ids), everything, Documents.from_bounds([0, len(ids)]), everything)


def like_transformers(folder: Path) -> float:
    """The largest difference between our logits and theirs, as a share of the largest logit."""
    imported = importing.read(folder)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    special = imported.tokenizer.vocabulary
    text = imported.tokenizer.encode(" ".join(sentences(9, seed=3)))[:80].astype(np.int64)
    ids = np.concatenate([[special.cls], text, [special.sep]])
    with torch.no_grad():
        expected, found = theirs(torch.from_numpy(ids)[None]).logits[0], logits(imported.model, ids)
    assert expected.std() > 0.3
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("kind", "changes"), [
    ("ModernBert", {}),
    ("ModernBert", {"layer_types": ["full_attention", "sliding_attention"] * 2, "local_attention": 20, "norm_eps": 1e-3,
                    "hidden_activation": "gelu_pytorch_tanh", "classifier_activation": "gelu_pytorch_tanh",
                    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}}),
    ("ModernBert", {"layer_types": ["full_attention"] * 4}),
    ("MegatronBert", {}),
    ("MegatronBert", {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new"}),
    ("XLMRobertaXL", {"max_position_embeddings": 500}),
    ("XLMRobertaXL", {"max_position_embeddings": 500, "type_vocab_size": 2}),
])  # fmt: skip
def test_logits_are_those_of_transformers(kind, changes, tmp_path):
    assert like_transformers(saved(tmp_path / "theirs", kind, **changes)) < 1e-5


def test_the_config_of_transformers_4(tmp_path):
    folder = saved(tmp_path / "theirs", "ModernBert", local_attention=20)
    config = json.loads((folder / "config.json").read_text())
    new = importing.our_config(config)
    for name in ("layer_types", "rope_parameters"):
        config.pop(name)
    old = importing.our_config({**config, "global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0,
                                "local_rope_theta": 10_000.0})  # fmt: skip
    assert new == old and (new.global_every, new.window, new.rope_base) == (3, 10, 160_000)


def test_half_precision_in_a_pickle_and_shards(tmp_path):
    """A pickle, as the released SOBert is, and several files, as large models have."""
    folder = saved(tmp_path / "theirs", "MegatronBert")
    whole = importing.read(folder).model
    tensors = importing.read_weights(folder)
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    half = importing.read(folder).model
    for ours, expected in zip(half.parameters(), whole.parameters()):
        assert ours.dtype == torch.float32 and torch.equal(ours, expected.half().float())

    folder = saved(tmp_path / "large", "MegatronBert")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    shutil.rmtree(folder)
    saved(folder, "MegatronBert")
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert all(map(torch.equal, importing.read(folder).model.parameters(), whole.parameters()))


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_pickle_is_executed(tmp_path, capsys):
    folder = saved(tmp_path / "theirs", "MegatronBert")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        importing.read(folder)
    assert "executed" not in capsys.readouterr().out


def changed(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(("changes", "expected"), [
    ({"model_type": "bert"}, "holds a 'bert'; minisobert imports modernbert, megatron-bert or xlm-roberta-xl. F"),
    ({"mlp_bias": True}, "mlp_bias is True; the layers of minisobert's modernbert have no biases"),
    ({"layer_types": ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"] * 1 + ["x"]}, "every n-th"),
    ({"layer_types": ["sliding_attention"] * 4}, "layer_types are llll"),
    ({"hidden_activation": "silu"}, "activation is 'silu'"),
    ({"classifier_activation": "gelu_new"}, "activation of the layers is 'gelu', and that of the head 'gelu_new'"),
    ({"hidden_size": 128}, "of another shape"),
    ({"num_hidden_layers": 5, "layer_types": None}, "missing (model.layers.4.attn"),
    ({"num_hidden_layers": 3, "layer_types": None}, "unexpected (model.layers.3."),
    ({"vocab_size": "many"}, "config.json"),
    ({"num_attention_heads": None}, "config.json"),
])  # fmt: skip
def test_what_is_no_model_of_ours_is_refused_in_one_line(changes, expected, tmp_path):
    folder = saved(tmp_path / "theirs", "ModernBert")
    changed(folder, **changes)
    with pytest.raises(ValueError) as error:
        importing.read(folder)
    assert expected in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    folder = saved(tmp_path / "theirs", "ModernBert")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer.model and no tokenizer.json"):
        importing.read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors and no pytorch_model.bin"):
        importing.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="is not a model in Hugging Face's format"):
        importing.read(folder)
    with pytest.raises(ValueError, match="nowhere is not a folder; download the model first"):
        importing.read(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("theirs") / "modern", "ModernBert", initializer_range=0.1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, theirs):
    """The toy language, encoded by the tokenizer of that model."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "toy.txt").write_text("\n".join(s.replace("\n", " ") for s in sentences(1_300, seed=0)))
    prepare([folder / "toy.txt"], folder / "shards", workers=1, tokenizer=theirs)
    return open_shards(folder / "shards")


def test_an_imported_model_is_a_run(theirs, tmp_path, capsys):
    importing.import_run(theirs, tmp_path / "run")
    run, read = open_run(tmp_path / "run"), importing.read(theirs)
    assert all(map(torch.equal, run.model.parameters(), read.model.parameters()))
    assert run.history == [{"imported": "modernbert", "from": "modern"}]
    playground.main([str(tmp_path / "run"), "the [MASK] sees"])
    assert "%" in capsys.readouterr().out
    for folder in (theirs, tmp_path / "run"):
        start = encoder.Start(FineTuneConfig("quality", str(folder), ("toy",), "out"))
        assert start.model_config == read.model.config and start.tokenizer.vocabulary == read.tokenizer.vocabulary
    with pytest.raises(ValueError, match="exists"):
        importing.import_run(theirs, tmp_path / "run")


def continued(corpus, out, init, **options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setitem)
        assert train.main(words(corpus, out, init=init, preset="modern-tiny", **{"steps": 6, **options})) == 0
    return out


def test_training_goes_on_from_a_model_of_theirs(corpus, theirs, tmp_path):
    """It begins with the same weights on any layout, an interrupted run resumes, and the history is kept."""
    importing.import_run(theirs, tmp_path / "imported")
    whole = continued(corpus, tmp_path / "whole", tmp_path / "imported", checkpoint_every_tokens=4 * 4 * 512)
    first = metrics(whole)[0]["loss"]
    model = importing.read(theirs).model
    batch = train.Rows(corpus, corpus.training_documents, 1, 512).micro_batch(0, 4, RECIPES["modern-tiny"]["mask_rate"])
    with torch.no_grad():
        found = model(batch.tokens, batch.positions, batch.documents, batch.masked)
    assert first == pytest.approx(torch.nn.functional.cross_entropy(found, batch.targets).item(), rel=1e-5)
    assert metrics(whole)[-1]["loss"] < first

    two = words(corpus, tmp_path / "two", steps=6, init=theirs, preset="modern-tiny", tensor_parallel=2)
    assert train_all([two], tmp_path / "log", ranks=2) == [0, 0], (tmp_path / "log").read_text()
    assert torch.allclose(column(tmp_path / "two"), column(whole), rtol=1e-5)
    direct = continued(corpus, tmp_path / "direct", theirs, micro_batch_rows=1)
    assert torch.allclose(column(direct), column(whole), rtol=1e-5)
    latest = sorted((whole / "checkpoints").iterdir())[-1]
    expected = weights(whole)
    shutil.rmtree(latest)
    continued(corpus, whole, tmp_path / "imported")
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(whole).items())
    assert open_run(whole).history == [
        {"imported": "modernbert", "from": "modern"}, {"run": "whole", "row positions": 6 * 4 * 512}
    ]  # fmt: skip

    further = continued(corpus, tmp_path / "further", whole, learning_rate=1e-9, muon_learning_rate=1e-9, steps=1)
    assert [list(entry.values())[1] for entry in open_run(further).history][1:] == [6 * 4 * 512, 4 * 512]
    for name, tensor in weights(further).items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


@pytest.mark.parametrize(("expected", "options"), [
    ("--layers cannot be changed in the model of --init", {"layers": 3}),
    ("was not encoded by the tokenizer of", {"data": "OTHER"}),
    ("is not a folder", {"init": "nowhere"}),
    ("holds no checkpoint", {"init": "EMPTY"}),
    ("holds an imported model; give it as --init", {"out": "IMPORTED"}),
    ("has a table of 96 positions", {"init": "MEGATRON"}),
])  # fmt: skip
def test_a_mistake_is_one_line(expected, options, corpus, theirs, tmp_path, request, capsys):
    given = {"init": str(theirs), "out": str(tmp_path / "out"), "data": str(corpus.folder)}
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": lambda: tmp_path / "empty", "OTHER": lambda: request.getfixturevalue("other"),
             "MEGATRON": lambda: saved(tmp_path / "old", "MegatronBert"),
             "IMPORTED": lambda: importing.import_run(theirs, tmp_path / "run") or tmp_path / "run"}  # fmt: skip
    given |= {name: str(names[value]()) if value in names else str(value) for name, value in options.items()}
    with pytest.raises(SystemExit) as left:
        train.main(words(corpus, given.pop("out"), **given))
    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert expected in error, error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A corpus with another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "toy.txt").write_text("\n".join(s.replace("\n", " ") for s in sentences(300, seed=1)))
    prepare([folder / "toy.txt"], folder / "shards", vocab_size=330, workers=1)
    return folder / "shards"


def test_the_plan_is_of_that_model(theirs, capsys):
    train.main(["--init", str(theirs), "--plan", "--gpus", "1", "--row-tokens", "2048"])
    parameters = sum(p.numel() for p in importing.read(theirs).model.parameters())
    assert f"modern: {parameters:,} parameters in 4 layers, hidden 64" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["ModernBert", "MegatronBert", "XLMRobertaXL"])
def test_out_and_in_and_out_again_changes_no_byte(kind, tmp_path):
    """For a model of theirs, from its first export on, which differs from what transformers wrote; and for ours."""
    theirs = saved(tmp_path / "theirs", kind, **({"max_position_embeddings": 500} if kind == "XLMRobertaXL" else {}))
    folder = theirs
    for turn in ("a", "b"):
        hub(["import", str(folder), "--out", str(tmp_path / f"run {turn}")])
        format = [] if kind != "MegatronBert" else ["--as", "megatron-bert"]
        hub(["export", str(tmp_path / f"run {turn}"), "--out", str(tmp_path / turn / "model"), *format])
        folder = tmp_path / turn / "model"
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(map(str, files))
    for file in files:
        if file.name != "README.md":  # it names the folder from which it was imported
            assert (tmp_path / "a/model" / file).read_bytes() == (folder / file).read_bytes(), file
    assert like_transformers(folder) < 1e-5
    assert "Imported, and not trained since:" in (folder / "README.md").read_text()
    ids = transformers.AutoTokenizer.from_pretrained(folder)("the [MASK] is").input_ids
    assert ids == transformers.AutoTokenizer.from_pretrained(theirs)("the [MASK] is").input_ids


def test_a_model_of_ours_comes_back_from_transformers(corpus, theirs, tmp_path):
    """What save_pretrained writes of an export has the same weights, and our tokenizer if its file is kept."""
    run = continued(corpus, tmp_path / "run", theirs, steps=2)
    hub(["export", str(run), "--out", str(tmp_path / "exported")])
    for auto in (transformers.AutoModelForMaskedLM, transformers.AutoTokenizer):
        auto.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "saved")
    back, ours = importing.read(tmp_path / "saved"), open_run(run)
    for (name, found), expected in zip(back.model.named_parameters(), ours.model.parameters()):
        rows = ours.tokenizer.vocab_size if name.endswith("decoder.bias") else len(expected)
        assert torch.equal(found[:rows], expected[:rows])
    assert back.model.config == ours.model.config and back.tokenizer.vocabulary == ours.tokenizer.vocabulary
    assert "- `modern`, a `modernbert` that was imported" in (tmp_path / "exported/README.md").read_text()
