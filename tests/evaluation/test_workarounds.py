"""What lm-eval 0.4.13 still does, and the package works around. A test that fails here says what can be removed."""

from typing import Any

import lm_eval.utils

from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
from tinyllama_hf.evaluation.tasks.suite import open_suite, quiet_harness, task_files


def test_lm_eval_still_compiles_a_template_for_each_item(monkeypatch):
    """If this fails, the workaround in task_loading.py can be removed. The requests are the same with it."""
    compiled: list[str] = []
    own = lm_eval.utils.env.from_string

    def count(template: str) -> Any:
        compiled.append(template)
        return own(template)

    requests = []
    with open_suite("embedded:sample", define_protocol(tasks=["arc_easy"])) as suite:
        task = suite.tasks["arc_easy"]
        monkeypatch.setattr(lm_eval.utils.env, "from_string", count)
        task.build_all_requests()
        assert len(compiled) >= 2 * 10 and len(set(compiled)) <= 3
        requests.append([request.args for request in task.instances])
        compiled.clear()
        with quiet_harness():
            task.build_all_requests()
        assert len(compiled) == len(set(compiled)) <= 3 and lm_eval.utils.env.from_string is count
        requests.append([request.args for request in task.instances])
    assert requests[0] == requests[1]


def test_lm_eval_still_processes_all_rows_at_each_access(monkeypatch):
    """If this fails, the workaround in suite.py can be removed. With it, they are processed once for all models."""
    with open_suite("embedded:sample", define_protocol(tasks=["hellaswag"])) as suite:
        task, processed = suite.tasks["hellaswag"], []
        process = task.config.process_docs

        def count(rows: Any) -> Any:
            processed.append(len(rows))
            return process(rows)

        monkeypatch.setattr(task.config, "process_docs", count)
        assert [len(type(task).validation_docs(task)), len(type(task).validation_docs(task))] == processed == [10, 10]
        assert task.eval_docs is task.eval_docs and processed == [10, 10]
        task.build_all_requests(limit=2)
        assert len(task.instances) == 8 and processed == [10, 10]


def test_lm_eval_still_draws_a_bar_for_each_task(capfd):
    """If this fails, the workaround in suite.py can be removed."""
    with open_suite("embedded:sample") as suite:
        suite.tasks["piqa"].build_all_requests()
        assert "10/10" in capfd.readouterr().err
        assert {name: len(task.eval_docs) for name, task in suite.tasks.items()} == dict.fromkeys(TASKS, 10)
    assert set(task_files("embedded:sample")) == set(TASKS)
