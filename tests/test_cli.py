"""The command line: every user error is one line and exit code 2; an interruption tells how to go on."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hfedmoe import __version__, cli
from tests.report.page.visitor import visiting

HEAVY = ("torch", "transformers", "flwr", "datasets", "peft", "rich", "pydantic")


def hfedmoe(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    code = stopped.value.code
    return 0 if code is None else int(code)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The folder of a short finished run, and who watched its page while it went on."""
    out = tmp_path_factory.mktemp("finished") / "run"
    smaller = ["--set", "federation.rounds=1", "--set", "train.steps=1", "--set", "data.test_rows=20"]
    with visiting() as visitor:
        assert hfedmoe("run", "tiny", "--live", "--out", out, *smaller) == 0
    return out, visitor


@pytest.fixture(scope="module")
def finished(watched):
    """The folder of a short finished run."""
    return watched[0]


# errors


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_user_errors_are_one_line_and_exit_code_2(here, capfd):
    full = here / "full"
    full.mkdir()
    write(full / "note.txt", "mine")
    wrong = write(here / "wrong.toml", '[train]\nlr = "fast"\n')
    unknown = write(here / "unknown.toml", "[train]\nlearning_rate = 1\n")
    broken = write(here / "broken.toml", "[train\n")
    few = "clients.budgets=[7]"
    cases = [
        (["run", "nowhere.toml"], "nowhere.toml: no such file"),
        (["run", unknown], "train.learning_rate: unknown key"),
        (["run", wrong], "train.lr"),
        (["run", broken], "not valid TOML"),
        (["run", "--set", "model.nme=x"], "did you mean name?"),
        (["run", "--set", "train.lr"], "expected section.key=value"),
        (["run", "--set", "train.lr=-1"], "train.lr"),
        (["run", "--set", "train.lr=inf"], "train.lr: "),
        (["run", "--set", "method.beta=nan"], "method.beta: "),
        (["run", "--out"], "`hfedmoe run --help` explains"),
        (["rnu"], "Did you mean 'run'?; `hfedmoe --help`"),
        (
            ["evaluate", "tiny", "--task", "piqa", "--set", "data.text=question"],
            "--set data.text: piqa has its own source and columns",
        ),
        (["run", "tiny", "--set", "model.name=nowhere/nothing", "--out", here / "a"], "model.name = nowhere/nothing"),
        (["run", "tiny", "--set", "data.source=nothing.csv", "--out", here / "b"], "nothing.csv"),
        (["run", "tiny", "--set", few, "--out", here / "c"], "needs at least 8"),
        (["run", "tiny", "--out", wrong], "is a file"),
        (["run", "tiny", "--out", wrong / "below"], "cannot be written"),
        (["run", "tiny", "--out", full], "is not empty"),
        (["resume", "nowhere"], "no such run folder"),
        (["resume", full], "not a run folder"),
        (["evaluate", full], "neither a run folder"),
        (["evaluate", "tiny", "--checkpoint", "last"], "not a run folder"),
        (["evaluate", "tiny", "--config", wrong], "train.lr"),
        (["inspect", "nowhere/nothing"], "model.name = nowhere/nothing"),
        (["inspect", full], "has no config.json"),
        (["inspect", "tiny", "--upcycle-experts", "4"], "cannot upcycle a mixtral model"),
        (["inspect", "tiny", "--upcycle-experts", "4", "--upcycle-top-k", "5"], "is more than"),
        (["upcycle", "tiny", here / "d"], "cannot upcycle a mixtral model"),
        (["upcycle", "tiny", full], "is not empty"),
        (["upcycle", "tiny", wrong / "below"], "cannot be written"),
        (["upcycle", "tiny", here / "d", "--dtype", "int8"], "expected float32"),
        (["upcycle", "tiny", here / "d", "--top-k", "9"], "is more than"),
        (["plan", "tiny", "--device", "4 bananas"], '--device "4 bananas": expected a share'),
        (["plan", "tiny", "--device", "0"], "--device 0: a budget must be at least one expert"),
        (["plan", "--model", here / "gone"], "no such folder"),
        (["plan", "--model", "smollm2"], "no Mixture-of-Experts layers"),
        # the parser's own
        (["nonsense"], "No such command"),
        (["run", "--nonsense"], "No such option"),
        (["run", "one", "two"], "unexpected extra argument"),
        (["resume"], "Missing argument"),
        (["upcycle", "tiny", here / "d", "--experts", "many"], "--experts"),
    ]
    write(here / "one.csv", "text,label\n" + "grain harvest,grain\noil price,crude\n" * 20)
    write(here / "none.csv", "text,label\n")
    one_per_client = ["--set", "clients.count=2", "--set", 'data.clients=["one.csv","none.csv"]']
    cases += [
        (["run", "tiny", *one_per_client, "--out", here / "e"], "none.csv"),
        (["run", "tiny", "--set", "partition.min_rows=1000", "--out", here / "f"], "partition.min_rows"),
    ]
    capfd.readouterr()
    for arguments, expected in cases:
        code = hfedmoe(*arguments)
        errors = capfd.readouterr().err.splitlines()
        assert (code, len(errors)) == (2, 1), (arguments, code, errors)
        assert errors[0].startswith("error: "), errors
        assert expected in errors[0], (arguments, errors)
    assert not (here / "d").exists()
    assert not list(here.glob(".tmp-*"))


def test_unexpected_errors_keep_their_traceback(here, monkeypatch):
    from hfedmoe import simulation

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(simulation, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["run", "tiny"])


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(here):
    """RLIMIT_FSIZE stands in for the full disk: it fails writes for any user, in a process of its own."""
    code = """
import resource, signal, sys
from hfedmoe.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
main(sys.argv[1:])
"""
    arguments = ["run", "tiny", "--out", str(here / "run"), "--set", "threads=1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "free some space" in line
    assert not list((here / "run" / "checkpoints").glob("round-*"))


# interruptions


def heed_interrupts():
    """In a child: shells let their background jobs ignore interrupts, and children inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_control_c_in_a_real_run_is_one_line(here):
    command = [sys.executable, "-m", "hfedmoe", "run", "tiny", "--out", "run", "--set", "federation.rounds=500"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    try:
        for line in child.stdout:
            if line.startswith("round 1/"):
                break
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 2
    assert errors == "interrupted; `hfedmoe resume run` continues\n"
    assert hfedmoe("resume", "run", "--help") == 0


def interrupted(config, out, watcher, begun):
    from hfedmoe.runs.folder import RunFolder

    with RunFolder.create(out, config):
        raise KeyboardInterrupt


def test_an_interrupted_run_tells_how_to_resume(here, monkeypatch, capsys):
    from hfedmoe import simulation

    monkeypatch.setattr(simulation, "run", interrupted)
    assert hfedmoe("run", "tiny", "--out", "my run") == 2
    assert capsys.readouterr().err == "interrupted; `hfedmoe resume 'my run'` continues\n"
    for suffix in ("", "-2"):  # without --out the folder is a new one every time
        assert hfedmoe("run", "tiny") == 2
        (found,) = capsys.readouterr().err.splitlines()
        assert f"-tiny{suffix}` continues" in found


def test_an_interrupted_resume_can_be_resumed(finished, monkeypatch, capsys):
    from hfedmoe import simulation

    def interrupt(path, watcher):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "resume", interrupt)
    assert hfedmoe("resume", finished) == 2
    assert f"`hfedmoe resume {finished}` continues" in capsys.readouterr().err


def test_an_interruption_anywhere_is_one_line(here, monkeypatch, capsys):
    from hfedmoe import __main__
    from hfedmoe.report import plan

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "plan_for", interrupt)
    assert hfedmoe("plan", "tiny") == 2
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setattr(cli, "main", interrupt)  # as while it is imported
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "interrupted\n"


def test_help_says_what_arguments_are(capsys):
    assert hfedmoe("run", "--help") == 0
    assert "A TOML file, or the name of a shipped one" in capsys.readouterr().out


def test_a_finished_run_says_so_when_resumed(finished, capsys):
    assert hfedmoe("resume", finished) == 0
    assert "all 1 rounds are done" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_is_one_line(finished, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    settings = (copy / "config.toml").read_text()
    assert "rank = 4" in settings
    (copy / "config.toml").write_text(settings.replace("rank = 4", "rank = 8").replace("rounds = 1", "rounds = 2"))
    assert hfedmoe("resume", copy) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "round-0001: does not fit the model (" in line


def test_rows_of_another_kind_than_the_runs_are_told_by_their_columns(finished, tmp_path, capsys):
    choices = {"prompt": "bank", "choices": ["oil rose", "trade fell"], "answer": 1}
    rows = write(tmp_path / "rows.jsonl", (json.dumps(choices) + "\n") * 3)
    assert hfedmoe("evaluate", finished, "--rows", rows, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 3
    assert found["accuracy_norm"] is not None


def test_resume_takes_a_name_that_would_be_a_pattern_for_what_it_is(here, capsys):
    assert hfedmoe("resume", "a**b[") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a**b[" in line


# commands


def test_help_and_version_import_nothing_heavy():
    for option in ("--help", "--version"):
        code = f"""
import contextlib, sys
from hfedmoe.cli import main
with contextlib.suppress(SystemExit):
    main(["{option}"])
sys.exit(", ".join(set({HEAVY!r}) & set(sys.modules)) or 0)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert __version__ in done.stdout or "evaluate" in done.stdout


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "hfedmoe", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hfedmoe {__version__}\n"


def test_the_environment_is_quiet():
    code = "import hfedmoe, os; print(*(os.environ[n] for n in ('FLWR_TELEMETRY_ENABLED', 'HF_HUB_DISABLE_TELEMETRY')))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "HF_"))}
    run = lambda env: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout  # noqa: E731
    assert run(clean) == "0 1\n"
    assert run(clean | {"FLWR_TELEMETRY_ENABLED": "1"}) == "1 1\n"  # who asks for it gets it


def test_show_config_prints_what_a_config_file_may_hold(here, capsys):
    assert hfedmoe("run", "tiny", "--set", "seed=7", "--set", 'unset=["data.test_rows"]', "--show-config") == 0
    shown = write(here / "shown.toml", capsys.readouterr().out)
    assert hfedmoe("run", shown, "--show-config") == 0
    assert capsys.readouterr().out == shown.read_text()
    assert "seed = 7" in shown.read_text()
    assert not (here / "runs").exists()


def test_the_config_of_a_run_can_be_run_again(finished, capsys):
    assert hfedmoe("run", finished / "config.toml", "--show-config") == 0
    assert "rounds = 1" in capsys.readouterr().out


def test_help_marks_what_is_required(capsys):
    assert hfedmoe("evaluate", "--help") == 0
    out = capsys.readouterr().out
    assert "[required]" in out
    assert "\\[" not in out


def cards(page):
    """The figures at the top of a page, as text by their names."""
    return dict(re.findall(r'<div class="card">([^<]*)<b>([^<]*)</b>', page))


def test_a_page_that_is_open_gets_the_last_state_of_a_run(watched):
    folder, visitor = watched
    assert visitor.told_the_end
    last = visitor.pages[-1]
    assert "1 of 1 rounds are done" in last
    assert "What did each site gain?" in last  # which is written after the last round
    start, done = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    found, shown = done["evaluation"]["all"], cards(last)
    assert shown["accuracy"] == f"{100 * found['accuracy']:.1f} %"
    assert float(shown["macro-F1 (mean over labels)"]) == pytest.approx(found["macro_f1"], abs=6e-4)
    assert float(shown["loss"]) == pytest.approx(found["loss"], abs=6e-4)
    assert shown["sent, both ways"] == f"{(done['bytes_down'] + done['bytes_up']) / 1024:.1f} KiB"
    assert f"before: {100 * start['accuracy']:.1f} %" in last
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in last.split("<tr>")]
    for site in done["sites"]:
        (cells,) = [row for row in rows if row[:3] == [site["name"], str(site["trained_rows"]), str(site["own_rows"])]]
        assert any(cell.startswith(f"{100 * site['federated']['accuracy']:.1f} %") for cell in cells)


def test_a_run_ends_with_a_report_and_it_can_be_written_again(finished, tmp_path, capsys):
    assert "<figure>" in (finished / "report.html").read_text(encoding="utf-8")
    (finished / "report.html").unlink()
    assert hfedmoe("report", finished, finished, "--out", tmp_path / "both.html") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    assert hfedmoe("report", finished) == 0
    assert (finished / "report.html").is_file()


def test_a_report_that_cannot_be_written_does_not_fail_the_run(finished, capsys):
    (finished / "report.html").unlink(missing_ok=True)
    (finished / "report.html").mkdir()
    assert hfedmoe("resume", finished) == 0
    assert "warning: no report was written: " in capsys.readouterr().err
    (finished / "report.html").rmdir()


def test_evaluate_a_run(finished, capsys):
    shown = {}
    for which in ("best", "last", "1"):
        assert hfedmoe("evaluate", finished, "--checkpoint", which) == 0
        shown[which] = capsys.readouterr().out.splitlines()[-1]
    assert hfedmoe("evaluate", finished) == 0
    assert capsys.readouterr().out.splitlines()[-1] == shown["best"]
    assert shown["last"] == shown["1"]
    assert shown["last"].startswith("accuracy ")
    for which, expected in (("99", "no checkpoint of round 99"), ("worst", "expected last, best or the number")):
        assert hfedmoe("evaluate", finished, "--checkpoint", which) == 2
        assert expected in capsys.readouterr().err
    assert hfedmoe("evaluate", finished, "--config", "tiny") == 2


def test_evaluate_a_model_on_the_rows_of_a_config(here, capsys):
    config = write(here / "own.toml", '[model]\nname = "tiny"\n[data]\ntest_rows = 12\n')
    assert hfedmoe("evaluate", "tiny", "--config", config) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("accuracy ")
    assert line.endswith(" on 12 rows")


def test_inspect(capsys):
    assert hfedmoe("inspect", "tiny") == 0
    text = capsys.readouterr().out
    assert hfedmoe("inspect", "tiny", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert "4 MoE layers, 32 experts" in text
    assert tree["num_experts"] == 32


def test_plan(capsys, monkeypatch):
    from hfedmoe.report import plan

    made = []

    def once(settings, devices, plan_for=plan.plan_for):
        made.append(made[0] if made else plan_for(settings, devices))  # rehearsing takes seconds
        return made[-1]

    monkeypatch.setattr(plan, "plan_for", once)
    arguments = ["plan", "--model", "tiny", "--device", "16GiB", "--device", "5"]
    assert hfedmoe(*arguments) == 0
    text = capsys.readouterr().out
    assert hfedmoe(*arguments, "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert "tiny: 4 MoE layers, 32 experts, top-2" in text
    assert tree["num_experts"] == [8, 8, 8, 8]
    assert [device["fits"] for device in tree["devices"]] == [True, False]
    assert tree["devices"][0]["forecast"]["num_residents"] == 32


def test_presets_are_listed_without_torch():
    code = """
import sys
from hfedmoe.cli import main
try:
    main(["plan", "--presets"])
except SystemExit as done:
    sys.exit("torch" in sys.modules or done.code or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "jetson-orin-nano-8gb" in done.stdout


def test_doctor(capsys):
    assert hfedmoe("doctor") == 0
    assert "can run" in capsys.readouterr().out
    assert hfedmoe("doctor", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["fit"]
    assert tree["packages"]["flwr"]


def test_the_picture_of_a_run_shows_its_last_table(finished, tmp_path):
    tool = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "run_picture.py"))
    tool["main"](finished, tmp_path / "run.svg")
    text = re.sub(r"<[^>]*>|&#160;", " ", (tmp_path / "run.svg").read_text())
    assert re.search(r"client\s+3", text)
    assert re.search(r"after\s+\(round\s+1\)", text)
