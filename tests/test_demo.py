"""`make demo` never loses an earlier demo, neither by a mistake nor by a failure halfway."""

import pytest

import demo


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "loss.png").write_text("good")
    (tmp_path / "broken.7z").write_text("no archive")
    return tmp_path / "runs"


def content(runs):
    return {str(path.relative_to(runs)): path.read_text() for path in sorted(runs.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("dump, message", [("typo.7z", "does not exist"), ("broken.7z", "not a .7z archive")])
def test_a_wrong_dump_is_refused_before_the_earlier_demo_is_moved(runs, capsys, dump, message):
    pytest.importorskip("py7zr")
    with pytest.raises(SystemExit, match="2"):
        demo.main([dump])
    output, errors = capsys.readouterr()
    assert output == ""
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert content(runs) == {"demo/loss.png": "good"}


@pytest.mark.parametrize(
    "failure, status", [(ValueError("no document"), 2), (KeyboardInterrupt(), 130), (SystemExit(1), 1)]
)
@pytest.mark.parametrize("made", [True, False])
def test_a_demo_that_fails_gives_the_earlier_one_its_name_back(runs, monkeypatch, failure, status, made):
    def fails(inputs):
        if made:
            (demo.OUT / "half").write_text("new")
        raise failure

    monkeypatch.setattr(demo, "demo", fails)
    with pytest.raises(SystemExit, match=str(status)):
        demo.main([])
    assert content(runs) == {"demo/loss.png": "good"} | ({"demo-2/half": "new"} if made else {})
    assert {path.name for path in runs.iterdir()} == ({"demo", "demo-2"} if made else {"demo"})


def test_a_demo_that_goes_well_takes_the_name_and_keeps_the_earlier_ones(runs, monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo", lambda inputs: (demo.OUT / "loss.png").write_text("new"))
    demo.main([])
    assert content(runs) == {"demo-1/loss.png": "good", "demo/loss.png": "new"}
    assert capsys.readouterr().out == "the earlier runs/demo is now runs/demo-1\n"
