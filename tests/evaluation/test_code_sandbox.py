"""Programs that a model could write, run for real: each is stopped, and none reaches anything outside."""

import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.evaluation.task_folders import DOUBLE
from tinyllama_hf.data.row_files import read_rows
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.tasks import code_runner, code_sandbox
from tinyllama_hf.evaluation.tasks.code_sandbox import Outcome, check_sandbox, run_program, run_programs
from tinyllama_hf.evaluation.tasks.code_tasks import (
    check_program,
    first_paragraph,
    pass_at_1,
    pass_at_2_to_64,
    pass_at_k,
    run_code_blocks,
    run_completions,
    run_first_paragraphs,
)


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    """Skips where util-linux cannot enter the namespaces either."""
    command = shutil.which("unshare")
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    namespaces = ["--net", "--mount", "--pid", "--ipc", "--uts", "--fork"]
    if not command or subprocess.run([command, *user, *namespaces, "true"], capture_output=True).returncode:
        pytest.skip("this system has no namespaces for this user")
    check_sandbox()


def test_programs_that_end():
    assert run_program("x = 1") == Outcome(True, "passed")
    assert run_program("import collections, hashlib, math, re\nassert hashlib.md5(b'').hexdigest()[0] == 'd'").passed
    assert run_program("assert 1 == 2") == Outcome(False, "AssertionError:")
    assert run_program("def f(:") == Outcome(False, "SyntaxError: invalid syntax (<program>, line 1)")
    assert run_program("assert __name__ == 'builtins'").passed, "as in human-eval, whose globals are empty"
    outcomes = run_programs([f"assert {n} % 3 == 0" for n in range(9)])
    assert [outcome.passed for outcome in outcomes] == [True, False, False] * 3


WRITE_EVERYWHERE = """
import os
for descriptor in range(64):
    try:
        os.write(descriptor, b"passed")
    except OSError:
        pass
os._exit(0)
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys\nsys.exit(0)\nassert False", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended early"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended early"),
        ("import ctypes\nctypes.string_at(0)", "ended early"),
        ("print('ready')\nprint('passed')\nassert False", "AssertionError"),
        (WRITE_EVERYWHERE, "passed"),
        ("input()", "EOFError"),
        ("import sys\nassert sys.stdin.read()", "AssertionError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
        ("open('a', 'w').write('x' * 20_000_000)", "File too large"),
        ("import os\nfor n in range(9):\n    open(str(n), 'w').write('x' * 15_000_000)", "No space left"),
        ("while True: pass", "stopped after 3 seconds"),
        ("import time\ntime.sleep(1000)", "stopped after 2 seconds"),
        ("import os\nos.fork()", "BlockingIOError"),
        ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
        ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])", "BlockingIOError"),
        ("import os\nos.execv('/bin/true', ['true'])", "ended early"),
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("open('/proc/self/status')", "FileNotFoundError"),
        ("import os\nos.kill(1, 9)\nos.kill(os.getppid(), 15)\nassert False", "AssertionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (99, 99))", "ValueError"),
        ("raise ValueError('x' * 10**6 + '\\ud800')", "ValueError: xxx"),
    ],
)  # fmt: skip
def test_programs_that_do_not_pass(monkeypatch, program, reason):
    monkeypatch.setattr(code_sandbox, "WALL_SECONDS", 2 if "sleep" in program else 60)
    outcome = run_program(program)
    assert not outcome.passed and reason in outcome.reason and len(outcome.reason) <= 600


FORK_BOMB = """
import os, time
started = 0
for _ in range(20):
    try:
        if os.fork() == 0:
            time.sleep(30)
        started += 1
    except OSError:
        pass
assert started == 0, started
"""


def test_a_fork_bomb_leaves_nothing():
    """Bounded by its own loop, in case that the limit is broken."""
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    assert run_program(FORK_BOMB).passed
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children


def test_a_stopped_program_leaves_no_process(monkeypatch):
    monkeypatch.setattr(code_sandbox, "WALL_SECONDS", 1)
    assert not run_program("import time\ntime.sleep(12345.5)").passed
    deadline = time.monotonic() + 20
    while running := [p for p in psutil.process_iter(["cmdline"]) if "code_runner.py" in str(p.info["cmdline"])]:
        assert time.monotonic() < deadline, running
        time.sleep(0.1)


def test_no_network():
    """A server of this machine, by address and by a name of its abstract and of its file sockets."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(f"\0tinyllama-{os.getpid()}")
        abstract.listen()
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        for target in (
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "socket.create_connection(('192.0.2.1', 80), 1)",
            f"socket.socket(socket.AF_UNIX).connect('\\0tinyllama-{os.getpid()}')",
            "socket.getaddrinfo('localhost.invalid', 80)",
        ):
            outcome = run_program(f"import socket\n{target}")
            assert not outcome.passed and ("Error" in outcome.reason or "gaierror" in outcome.reason), outcome


def test_files_outside(tmp_path):
    """Neither this folder nor the interpreter's can be written to, and the first is not even there."""
    (tmp_path / "secret").write_text("x")
    library = Path(math.__file__ if hasattr(math, "__file__") else os.__file__).parent
    for program, reason in (
        (f"open({str(tmp_path / 'secret')!r})", "FileNotFoundError"),
        (f"open({str(tmp_path / 'new')!r}, 'w')", "FileNotFoundError"),
        (f"open({str(library / 'new_by_test')!r}, 'w')", "OSError: [Errno 30] Read-only"),
        (f"import os\nos.chmod({os.__file__!r}, 0o777)", "Error"),
        ("import os\nassert os.listdir('.') == [] and os.getcwd() != '/'\nos.chroot('.')", "PermissionError"),
    ):
        outcome = run_program(program)
        assert (not outcome.passed and reason.split(":")[0] in outcome.reason) or "Permission" in outcome.reason, (
            outcome
        )
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]
    assert run_program("open('own', 'w').write('x')\nassert open('own').read() == 'x'").passed
    assert run_program("import os\nassert os.listdir('.') == []").passed, "each program has a new folder"


def test_a_clean_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os\nassert 'HF_TOKEN' not in os.environ and len(os.environ) <= 6").passed


def test_a_system_without_namespaces_is_refused_and_not_scored(monkeypatch, tmp_path):
    """A runner that cannot enter them, as in most containers."""
    source = Path(code_runner.__file__).read_text()
    broken = source.replace('_call("unshare", _NEW_PID', '_call("unshare", 1 | _NEW_PID')
    assert broken != source
    (tmp_path / "code_runner.py").write_text(broken)
    monkeypatch.setattr(code_sandbox, "__file__", str(tmp_path / "code_sandbox.py"))
    with pytest.raises(InputError, match=r"--run-code: .*\(unshare: .*\).*Linux 5\.12"):
        run_program("x = 1")
    with pytest.raises(InputError, match="--run-code"):
        check_sandbox()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="this is darwin"):
        check_sandbox()


@pytest.mark.parametrize("missing", ["_NEW_NET", "_NEW_MOUNTS", "RLIMIT_NPROC"])
def test_the_check_notices_a_missing_limit(monkeypatch, tmp_path, missing):
    """Runners with one part taken out."""
    source = Path(code_runner.__file__).read_text()
    broken = {
        "_NEW_NET": source.replace("_NEW_PID | _NEW_NET", "_NEW_PID"),
        "_NEW_MOUNTS": source.replace('_mount("tmpfs", folder', 'return _call("getpid")\n    _mount("tmpfs", folder'),
        "RLIMIT_NPROC": source.replace("resource.RLIMIT_NPROC: 0,", ""),
    }[missing]
    assert broken != source
    (tmp_path / "code_runner.py").write_text(broken)
    monkeypatch.setattr(code_sandbox, "__file__", str(tmp_path / "code_sandbox.py"))
    with pytest.raises(InputError, match="reached something outside"):
        check_sandbox()


@pytest.mark.skipif(os.geteuid() != 0, reason="root takes the other way through namespaces by itself")
def test_an_ordinary_user(tmp_path):
    """With the system's own Python, since that of the tests may be in a folder of root."""
    python = Path("/usr/bin/python3")
    if (
        not python.is_file()
        or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode
    ):
        pytest.skip("needs a Python of the system")
    package = Path(code_sandbox.__file__).parents[2]
    for name in ("errors.py", "evaluation/tasks/code_runner.py", "evaluation/tasks/code_sandbox.py"):
        copy = tmp_path / "tinyllama_hf" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((package / name).read_text())
        (copy.parent / "__init__.py").touch()
    program = (
        "from tinyllama_hf.evaluation.tasks.code_sandbox import check_sandbox, run_program\n"
        "check_sandbox()\nprint(run_program('x = 1'), run_program('import os; os.fork()'))"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    done = subprocess.run(
        [python, "-c", program], env={"PYTHONPATH": str(tmp_path)}, user=65534, group=65534, extra_groups=[],
        cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert "passed=True" in done.stdout and "BlockingIOError" in done.stdout, done.stdout + done.stderr


def test_replies_of_humaneval():
    replies = [
        "    return 2 * x\n",
        "    return x + 2\n",
        "    return x * 2\n\n\nprint(1 / 0)",
        "    return 2 * x\n```\nDone.",
    ]
    assert run_completions([replies], [DOUBLE]) == [[True, False, False, False]]
    assert run_code_blocks([replies], [DOUBLE]) == [[True, False, False, True]]
    assert run_first_paragraphs([replies, replies[:1]], [DOUBLE] * 2) == [[True, False, True, False], [True]]
    assert check_program(DOUBLE, "code") == f"code\n{DOUBLE['test']}\ncheck(double)"


def test_the_cut_of_instruct_eval():
    assert first_paragraph("\n\n   a = 1\n  b\n\nc") == "    a = 1\n  b"
    assert first_paragraph("  a\n \n  b") == "  a\n  \n  b", "a line of one space becomes two, and is not blank"


def test_pass_at_k():
    """Against the product of human-eval's estimator, over all n, c and k."""
    for n in range(1, 12):
        for c in range(n + 1):
            for k in range(1, n + 1):
                product = math.prod(1 - k / i for i in range(n - c + 1, n + 1))
                expected = 1.0 if n - c < k else 1 - product
                assert pass_at_k([True] * c + [False] * (n - c), k) == pytest.approx(expected, abs=1e-12)
    assert pass_at_1(DOUBLE, [[True, False, False, False]]) == {"pass@1": 0.25}
    assert pass_at_2_to_64(DOUBLE, [[True] * 64]) == {f"pass@{k}": 1.0 for k in (2, 8, 16, 32, 64)}


@pytest.mark.slow
def test_all_problems(shared):
    """All 164 canonical solutions pass; none does without its last line, or as a function that returns nothing."""
    rows = [row for _, row in read_rows(shared / "data" / "eval" / "humaneval" / "test.jsonl.gz")]
    assert len(rows) == 164
    replies = [[row["canonical_solution"], "    return None\n", "    pass\n"] for row in rows]
    assert run_completions(replies, rows) == [[True, False, False]] * 164
